"""Operands to kernel arguments: TMA descriptors, parameter blocks, grids. Encoded once, then cached.

The layouts here mirror ``templates/include/srelu24/sm90/params.cuh`` (the parameter structs) and
``tile_load.cuh`` (the boxes and the row order of B): keep them in step.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srelu24.numerics.dtypes import TORCH_DTYPE, FragmentOrder
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import Arguments as Arguments
from srelu24.runtime.arguments import encode_mma_sync, fast_divmod, plan_mma_sync, raster_params
from srelu24.runtime.loader import ArgumentBlock, LoadedKernel, load, stream
from srelu24.runtime.tensor_map import tensor_map
from srelu24.runtime.workspace import Workspace, workspace
from srelu24_gen.bindings import PACKING_OPS, WARPGROUP_THREADS, footprint
from srelu24_gen.compile import build
from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import DType, Instructions, KernelSpec, Op, Problem
from srelu24_gen.work_plan import plan_work

_CACHED_BLOCKS = 4096
"""Parameter blocks kept per kernel; torch's allocator reuses addresses, so few are needed."""


@dataclass(slots=True)
class Scales:
    """What a kernel of docs/fp8.md needs besides its operands; each kernel knows some of the fields.

    a: of A, fp32 [M], or [1] for all rows. b: of B, fp32 [N].
    s_inverse: what gemm_relu2_24 to e4m3 multiplies r * r by, fp32 [M] or [1]; quantize_rows writes it.
    saturated: int64, added to by gemm_relu2_24 to e4m3.
    r_largest: fp32 [M], the largest r of each row: quantize_rows clears it, gemm_relu2_24 to bf16 raises it, and
        square_rows reads it.
    rows: fp32 [M], the scales of the output, written by quantize_rows and square_rows.
    row_norm: fp32, of W1. Given to quantize_rows, it writes ``s_scale`` and ``s_inverse``, fp32 [M], as predicted.
    bias_largest: fp32, with row_norm.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    s_inverse: Tensor | None = None
    saturated: Tensor | None = None
    r_largest: Tensor | None = None
    rows: Tensor | None = None
    row_norm: Tensor | None = None
    bias_largest: Tensor | None = None
    s_scale: Tensor | None = None


@dataclass(slots=True)  # not frozen: that would cost a microsecond a launch
class Operands:
    """The tensors of one launch, all on one CUDA device. Shapes as in :class:`srelu24_gen.spec.Op`.

    a: [M, K], last dimension contiguous; a Sparse24 of shape (M, K) for spgemm.
    b: [N, K], last dimension contiguous (none for sparsify24).
    bias: [N]. residual: [M, N], last dimension contiguous. counts: int32 [N], added to.
    out: [M, N]; a Sparse24 of shape (M, N) for gemm_relu2_24, sparsify24 and square_rows. Written whole.
    scales: for 8-bit kernels, whose bias is fp32.
    """

    a: Tensor | Sparse24
    out: Tensor | Sparse24
    b: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    counts: Tensor | None = None
    scales: Scales | None = None


def allocate(problem: Problem, device: torch.device) -> Tensor | Sparse24:
    """An uninitialised output for ``problem``; the kernels write all of it."""
    family = problem.family
    dtype = TORCH_DTYPE[family.out or family.dtype]
    if family.op.prunes or family.op in (Op.SPARSIFY24, Op.SQUARE_ROWS):
        order = FragmentOrder.BITS8 if DType.E4M3 in (family.dtype, family.out) else FragmentOrder.BITS16
        return Sparse24.empty(problem.m, problem.n, dtype, device, order)
    return torch.empty(problem.m, problem.n, dtype=dtype, device=device)


def run(spec: KernelSpec, operands: Operands) -> None:
    """Launch on the current torch stream of the operands' device, without synchronising.

    Builds and loads the kernel on first use. The operands are trusted: callers check shapes, types and
    alignment (:mod:`srelu24.ops.functions`).

    Raises:
        CompileError, ToolchainError: the kernel could not be built.
        LaunchError: the driver refused the cubin or the launch.
    """
    out = operands.out.values if isinstance(operands.out, Sparse24) else operands.out
    if out.shape[0] == 0:
        return
    launcher_for(spec, out.device.index)(operands)


@functools.cache
def launcher_for(spec: KernelSpec, device: int) -> Launcher:
    """The loaded kernel of ``spec`` on ``cuda:device`` with its argument cache.

    Raises:
        LaunchError: the kernel is not loaded yet and a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise LaunchError(f"{spec.name} is not loaded yet; run the operation once before capturing a CUDA graph.")
    return _LAUNCHERS.get(spec.family.op, _GEMM_LAUNCHERS[spec.instructions])(spec, device)


class GemmLauncher:
    """gemm, gemm_relu2_24 and spgemm of one spec on one device: the wgmma kernels."""

    def __init__(self, spec: KernelSpec, device: int) -> None:
        self.spec = spec
        self.size = footprint(spec.family, spec.config)
        self.kernel: LoadedKernel = load(
            build(spec), device, threads=self.size.threads, shared_bytes=self.size.shared_bytes
        )
        self.sm_count = torch.cuda.get_device_properties(device).multi_processor_count
        self._blocks: dict[tuple[Any, ...], tuple[ArgumentBlock, int]] = {}

    def __call__(self, o: Operands) -> None:
        a = o.a.values if isinstance(o.a, Sparse24) else o.a
        out = o.out.values if isinstance(o.out, Sparse24) else o.out
        assert o.b is not None
        m, (n, k) = a.shape[0], o.b.shape
        space = self._workspace(m, n, k, out.device) if self.spec.config.stream_k else None
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
            () if o.scales is None else scale_pointers(o.scales),
        )
        block, grid = self._encoded(key)
        self.kernel.launch(grid, block.address, stream(self.kernel.device))

    def _encoded(self, key: tuple[Any, ...]) -> tuple[ArgumentBlock, int]:
        """The parameter block of these arguments, and the grid."""
        found = self._blocks.get(key)
        if found is None:
            found = self.encode(Arguments(*key))
            if len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.clear()
            self._blocks[key] = found
        return found

    def _workspace(self, m: int, n: int, k: int, device: torch.device) -> Workspace | None:
        flags, floats = self.workspace_size(m, n, k)
        return workspace(flags, floats, device) if flags else None

    def workspace_size(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Flags, and floats for partial sums, of stream-K: one slot a consumer warpgroup; none if no tile is split."""
        c = self.spec.config
        plan = plan_work(c, m, n, k, self.sm_count)
        if not plan.split:
            return 0, 0
        slots = plan.clusters * c.cluster_m * self.size.consumers
        return slots, slots * c.tile_n // 2 * WARPGROUP_THREADS

    def encode(self, x: Arguments) -> tuple[ArgumentBlock, int]:
        """GemmParams of ``params.cuh``, and the grid."""
        c = self.spec.config
        plan = plan_work(c, x.m, x.n, x.k, self.sm_count)
        pointers = (x.metadata, x.out, x.out_metadata, x.bias, x.residual, x.counts)
        content = b"".join(
            (
                *self._maps(x),
                struct.pack("<6Q2q4i", *pointers, x.out_stride, x.residual_stride, x.m, x.n, x.k, plan.k_blocks),
                raster_params(plan),
                struct.pack("<4x3i", plan.first_tile, plan.units, plan.extra),
                fast_divmod(plan.tile_units),
                struct.pack("<2Q", x.partials, x.flags),
                struct.pack("<5Q2i", *(x.scales or (0,) * 7)),
                struct.pack("<4Q2q2i", *(x.tokens or (0,) * 8)),
            )
        )
        return ArgumentBlock(content), plan.clusters * c.cluster_m

    def _maps(self, x: Arguments) -> tuple[bytes, bytes, bytes, bytes]:
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
        return a, *self._maps_b(x.b, x.n, x.k, x.b_stride)

    def _maps_b(self, b: int, n: int, k: int, stride: int) -> tuple[bytes, bytes, bytes]:
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
    """The same for the mma.sync kernels, which read their operands by plain addresses."""

    def workspace_size(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Flags, and floats for the sums of every slice but the last of each tile; none if no tile is split."""
        c, (plan, slices) = self.spec.config, plan_mma_sync(self.spec, m, n, k, self.sm_count)
        if slices == 1:
            return 0, 0
        return plan.tiles, plan.tiles * (slices - 1) * c.tile_m * c.tile_n

    def encode(self, x: Arguments) -> tuple[ArgumentBlock, int]:
        return encode_mma_sync(self.spec, x, self.sm_count)


class SparsifyLauncher:
    """sparsify24 of one spec on one device."""

    def __init__(self, spec: KernelSpec, device: int) -> None:
        self.kernel = load(build(spec), device, threads=WARPGROUP_THREADS, shared_bytes=0)

    def __call__(self, o: Operands) -> None:
        assert isinstance(o.a, Tensor)
        assert isinstance(o.out, Sparse24)
        m, n = o.a.shape
        values, metadata = o.out.values, o.out.metadata
        block = ArgumentBlock(
            struct.pack(
                "<3Q2q2i",
                o.a.data_ptr(),
                values.data_ptr(),
                metadata.data_ptr(),
                o.a.stride(0),
                values.stride(0),
                m,
                n,
            )
        )
        grid = metadata.shape[0] * metadata.shape[1]
        self.kernel.launch(grid, block.address, stream(self.kernel.device))


class QuantizeLauncher:
    """quantize_rows of one spec on one device: ``a`` [M, N] to ``out``, e4m3 [M, N], and ``scales.rows``."""

    def __init__(self, spec: KernelSpec, device: int) -> None:
        self.kernel = load(build(spec), device, threads=WARPGROUP_THREADS, shared_bytes=0)

    def __call__(self, o: Operands) -> None:
        assert isinstance(o.a, Tensor)
        assert isinstance(o.out, Tensor)
        s = o.scales
        assert s is not None
        m, n = o.a.shape
        results = (s.rows, s.r_largest, s.row_norm, s.bias_largest, s.s_scale, s.s_inverse)
        block = ArgumentBlock(
            struct.pack(
                "<8Q2q2i",
                o.a.data_ptr(),
                o.out.data_ptr(),
                *(0 if t is None else t.data_ptr() for t in results),
                o.a.stride(0),
                o.out.stride(0),
                m,
                n,
            )
        )
        self.kernel.launch(m, block.address, stream(self.kernel.device))


class SquareLauncher:
    """square_rows of one spec on one device: the values of ``a`` to those of ``out``, and ``scales.rows``."""

    def __init__(self, spec: KernelSpec, device: int) -> None:
        self.kernel = load(build(spec), device, threads=WARPGROUP_THREADS, shared_bytes=0)

    def __call__(self, o: Operands) -> None:
        assert isinstance(o.a, Sparse24)
        assert isinstance(o.out, Sparse24)
        assert o.scales is not None
        assert o.scales.r_largest is not None
        assert o.scales.rows is not None
        m, n = o.a.shape
        block = ArgumentBlock(
            struct.pack(
                "<4Q2q2i",
                o.a.values.data_ptr(),
                o.out.values.data_ptr(),
                o.scales.r_largest.data_ptr(),
                o.scales.rows.data_ptr(),
                o.a.values.stride(0),
                o.out.values.stride(0),
                m,
                n,
            )
        )
        self.kernel.launch(m, block.address, stream(self.kernel.device))


def row_stride(matrix: Tensor) -> int:
    """Elements between rows. Of a single row torch keeps any stride, and the TMA wants a multiple of 16 bytes."""
    step = 16 // matrix.itemsize
    return matrix.stride(0) if matrix.shape[0] > 1 else -(-matrix.shape[1] // step) * step


def scale_pointers(s: Scales) -> tuple[int, ...]:
    """The fields of ScaleParams: five pointers, then the steps from row to row."""
    pointers = tuple(0 if t is None else t.data_ptr() for t in (s.a, s.b, s.s_inverse, s.r_largest, s.saturated))
    return (*pointers, *(int(t is not None and t.numel() > 1) for t in (s.a, s.s_inverse)))


Launcher = GemmLauncher | SparsifyLauncher | QuantizeLauncher | SquareLauncher
_GEMM_LAUNCHERS = {Instructions.WGMMA: GemmLauncher, Instructions.MMA_SYNC: MmaSyncLauncher}
_LAUNCHERS: dict[Op, type[SparsifyLauncher | QuantizeLauncher | SquareLauncher]] = {
    Op.SPARSIFY24: SparsifyLauncher,
    Op.QUANTIZE_ROWS: QuantizeLauncher,
    Op.SQUARE_ROWS: SquareLauncher,
}
