"""Launchers of the GEMMs: tensor maps, parameter blocks and grids, encoded once for each set of arguments and kept.

The boxes and the row order of B mirror ``templates/include/srelu24/sm90/tile_load.cuh``: keep them in step.
"""

from __future__ import annotations

from typing import Any

import torch

from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import (
    Arguments,
    Operands,
    encode_mma_sync,
    fast_divmod,
    plan_mma_sync,
    raster_params,
    row_stride,
    scale_arguments,
    scale_params,
)
from srelu24.runtime.loader import ArgumentBlock, LoadedKernel, keep_block, stream
from srelu24.runtime.parameters import GEMM_PARAMS_SM90, SPLIT_PARAMS, TOKEN_PARAMS
from srelu24.runtime.tensor_map import tensor_map
from srelu24.runtime.workspace import Workspace, workspace
from srelu24_gen.bindings import PACKING_OPS, WARPGROUP_THREADS, footprint
from srelu24_gen.spec import KernelSpec, Op
from srelu24_gen.work_plan import plan_work


class GemmLauncher:
    """Launches gemm, gemm_relu2_24 and spgemm: the wgmma kernels.

    Args:
        spec: what the kernel was built from.
        kernel: loaded on the device of the operands to come.
    """

    def __init__(self, spec: KernelSpec, kernel: LoadedKernel) -> None:
        self.spec, self.kernel = spec, kernel
        self.size = footprint(spec.family, spec.config)
        self._blocks: dict[tuple[Any, ...], tuple[ArgumentBlock, int]] = {}

    def __call__(self, o: Operands) -> None:
        a = o.a.values if isinstance(o.a, Sparse24) else o.a
        out = o.out.values if isinstance(o.out, Sparse24) else o.out
        assert o.b is not None
        m, (n, k) = a.shape[0], o.b.shape
        space = self._find_workspace(m, n, k, out.device) if self.spec.config.stream_k else None
        key = (  # the fields of Arguments, as the plain tuple that hashes fastest
            a.data_ptr(),
            o.b.data_ptr(),
            out.data_ptr(),
            o.a.metadata.data_ptr() if isinstance(o.a, Sparse24) else 0,
            o.out.metadata.data_ptr() if isinstance(o.out, Sparse24) else 0,
            0 if o.bias is None else o.bias.data_ptr(),
            0 if o.residual is None else o.residual.data_ptr(),
            0 if o.counts is None else o.counts.data_ptr(),
            0 if space is None else space.partials.data_ptr(),
            0 if space is None else space.flags.data_ptr(),
            m,
            n,
            k,
            row_stride(a),
            o.b.stride(0),
            out.stride(0),
            0 if o.residual is None else o.residual.stride(0),
            None if o.scales is None else scale_arguments(o.scales),
        )
        block, grid = self._find_or_encode(key)
        self.kernel.launch(grid, block.address, stream(self.kernel.device))

    def _find_or_encode(self, key: tuple[Any, ...]) -> tuple[ArgumentBlock, int]:
        """The parameter block of these arguments, and the grid."""
        found = self._blocks.get(key)
        if found is None:
            found = self.encode(Arguments(*key))
            keep_block(self._blocks, key, found)
        return found

    def _find_workspace(self, m: int, n: int, k: int, device: torch.device) -> Workspace | None:
        flags, floats = self.workspace_size(m, n, k)
        return workspace(flags, floats, device) if flags else None

    def workspace_size(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Flags, and floats for partial sums, of stream-K: a slot for each consumer warpgroup, or 0, 0 where no tile is
        split."""
        c = self.spec.config
        plan = plan_work(c, m, n, k, self.kernel.sm_count)
        if not plan.split:
            return 0, 0
        slots = plan.clusters * c.cluster_m * self.size.consumers
        return slots, slots * c.tile_n // 2 * WARPGROUP_THREADS

    def encode(self, x: Arguments) -> tuple[ArgumentBlock, int]:
        """GemmParams of ``sm90/params.cuh``, and the grid."""
        c = self.spec.config
        plan = plan_work(c, x.m, x.n, x.k, self.kernel.sm_count)
        first_map, share, low, high = self._encode_maps(x)
        content = GEMM_PARAMS_SM90.pack(
            a=first_map,
            b_share=share,
            b_rows=low + high,
            metadata=x.metadata,
            out=x.out,
            out_metadata=x.out_metadata,
            bias=x.bias,
            residual=x.residual,
            counts=x.counts,
            out_stride=x.out_stride,
            residual_stride=x.residual_stride,
            m=x.m,
            n=x.n,
            k=x.k,
            k_blocks=plan.k_blocks,
            raster=raster_params(plan),
            split=SPLIT_PARAMS.pack(
                first_tile=plan.first_tile,
                units=plan.units,
                extra=plan.extra,
                tile_units=fast_divmod(plan.tile_units),
                partials=x.partials,
                flags=x.flags,
            ),
            scale=scale_params(x.scales),
            tokens=TOKEN_PARAMS.zeros() if x.tokens is None else TOKEN_PARAMS.pack(**x.tokens._asdict()),
        )
        return ArgumentBlock(content), plan.clusters * c.cluster_m

    def _encode_maps(self, x: Arguments) -> tuple[bytes, bytes, bytes, bytes]:
        """a, b_share, b_rows[0], b_rows[1]."""
        c, sparse = self.spec.config, self.spec.family.op is Op.SPGEMM
        a = tensor_map(
            self.spec.family.dtype,
            x.a,
            dims=(x.k // 2 if sparse else x.k, x.m),
            strides=(x.a_stride,),
            box=(c.tile_k // 2 if sparse else c.tile_k, c.tile_m),
            swizzle_bytes=64 if sparse else 128,
        )
        return a, *self._encode_maps_of_b(x.b, x.n, x.k, x.b_stride)

    def _encode_maps_of_b(self, b: int, n: int, k: int, stride: int) -> tuple[bytes, bytes, bytes]:
        """b_share, b_rows[0], b_rows[1] of ``tile_load.cuh``: B's rows in the kernel's load order."""
        c, dtype = self.spec.config, self.spec.family.weight or self.spec.family.dtype
        run = 16 if self.spec.family.op in PACKING_OPS else 8
        block = 4 * run

        def whole_blocks() -> bytes:
            # Without a whole block nothing inside is read through this map, but it must be encodable.
            return tensor_map(
                dtype,
                b,
                dims=(k, 2, 4, run // 2, max(1, n // block)),
                strides=(stride, run * stride, 2 * stride, block * stride),
                box=(c.tile_k, 2, 4, run // 2, c.tile_n // c.cluster_m // block),
                swizzle_bytes=128,
            )

        def rows_from(first: int) -> bytes:
            return tensor_map(
                dtype,
                b + first * stride * dtype.bytes,
                dims=(k, 2, -(-(n - first) // run), 4),
                strides=(stride, run * stride, 2 * stride),
                box=(c.tile_k, 2, 4, 4),
                swizzle_bytes=128,
            )

        if n % block == 0:  # no ragged end: b_rows is never read
            share = whole_blocks()
            return share, share, share
        low = rows_from(0)
        # With n == 8 the upper half of the run does not exist; what is loaded for it is zeroed later.
        high = rows_from(8) if run == 16 and n > 8 else low
        return whole_blocks(), low, high


class MmaSyncLauncher(GemmLauncher):
    """Launches the same operations as mma.sync kernels, which read their operands by plain addresses."""

    def workspace_size(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Flags, and floats for the sums of every slice but the last of each tile, or 0, 0 where no tile is split."""
        c, (plan, slices) = self.spec.config, plan_mma_sync(self.spec, m, n, k, self.kernel.sm_count)
        if slices == 1:
            return 0, 0
        return plan.tiles, plan.tiles * (slices - 1) * c.tile_m * c.tile_n

    def encode(self, x: Arguments) -> tuple[ArgumentBlock, int]:
        return encode_mma_sync(self.spec, x, self.kernel.sm_count)
