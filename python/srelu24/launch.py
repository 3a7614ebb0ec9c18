"""Operands to kernel arguments: TMA descriptors, parameter blocks, grids. Encoded once, then cached.

The layouts here mirror ``templates/include/srelu24/sm90/params.cuh`` (the parameter structs) and
``tile_load.cuh`` (the boxes and the row order of B): keep them in step.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srelu24.loader import ArgumentBlock, LoadedKernel, load
from srelu24.sparse24 import Sparse24
from srelu24.tensor_map import tensor_map
from srelu24_gen.bindings import PACKING_OPS, WARPGROUP_THREADS, footprint
from srelu24_gen.compile import build
from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import DType, KernelConfig, KernelSpec, Op, Problem

TORCH_DTYPE = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}
DTYPES = {dtype: name for name, dtype in TORCH_DTYPE.items()}
"""Storage types of the kernels, by torch's name."""
_CACHED_BLOCKS = 4096
"""Parameter blocks kept per kernel; torch's allocator reuses addresses, so few are needed."""


@dataclass(slots=True)  # not frozen: that would cost a microsecond a launch
class Operands:
    """The tensors of one launch, all on one CUDA device. Shapes as in :class:`srelu24_gen.spec.Op`.

    a: [M, K], last dimension contiguous; a Sparse24 of shape (M, K) for spgemm.
    b: [N, K], last dimension contiguous (none for sparsify24).
    bias: [N]. residual: [M, N], last dimension contiguous. counts: int32 [N], added to.
    out: [M, N]; a Sparse24 of shape (M, N) for gemm_relu2_24 and sparsify24. Written whole.
    """

    a: Tensor | Sparse24
    out: Tensor | Sparse24
    b: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    counts: Tensor | None = None


def allocate(problem: Problem, device: torch.device) -> Tensor | Sparse24:
    """An uninitialised output for ``problem``; the kernels write all of it."""
    dtype = TORCH_DTYPE[problem.family.dtype]
    if problem.family.op in (Op.GEMM_RELU2_24, Op.SPARSIFY24):
        return Sparse24.empty(problem.m, problem.n, dtype, device)
    return torch.empty(problem.m, problem.n, dtype=dtype, device=device)


def run(spec: KernelSpec, operands: Operands) -> None:
    """Launch on the current torch stream of the operands' device, without synchronising.

    Builds and loads the kernel on first use. The operands are trusted: callers check shapes, types and
    alignment (:mod:`srelu24.ops`).

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
    return (SparsifyLauncher if spec.family.op is Op.SPARSIFY24 else GemmLauncher)(spec, device)


class Arguments(NamedTuple):
    """Everything a GEMM's parameter block depends on: addresses, sizes, and row strides in elements."""

    a: int
    b: int
    out: int
    metadata: int
    out_metadata: int
    bias: int
    residual: int
    counts: int
    partials: int
    flags: int
    m: int
    n: int
    k: int
    a_stride: int
    b_stride: int
    out_stride: int
    residual_stride: int
    tokens: tuple[int, ...] = (0,) * 8
    """TokenParams of ``params.cuh``; zeros for kernels of the forward pass."""


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """How the clusters share the output tiles: RasterParams and SplitParams of ``params.cuh``."""

    tiles_m: int
    """Cluster tiles along M."""
    tiles_n: int
    group: int
    """Cluster tiles walked along M before moving on along N."""
    clusters: int
    """Clusters launched; each has work."""
    k_blocks: int
    first_tile: int
    """Tiles from here on are split along K; ``tiles`` when none are."""
    tile_units: int
    """Units of four k-blocks in a tile."""
    units: int
    """Units of the split tiles that every cluster takes..."""
    extra: int
    """...and the first ``extra`` clusters one more."""

    @property
    def tiles(self) -> int:
        return self.tiles_m * self.tiles_n


@functools.lru_cache(maxsize=_CACHED_BLOCKS)
def plan_work(config: KernelConfig, m: int, n: int, k: int, sm_count: int) -> WorkPlan:
    """Share [m, n] over the multiprocessors. Whole waves of tiles stay whole; with ``stream_k`` the rest is split."""
    tiles_m, tiles_n = -(-m // (config.tile_m * config.cluster_m)), -(-n // config.tile_n)
    tiles, most = tiles_m * tiles_n, sm_count // config.cluster_m
    k_blocks = -(-k // config.tile_k)
    tile_units = -(-k_blocks // 4)
    rest = tiles % most if config.stream_k else 0
    units, extra = divmod(rest * tile_units, most)
    if rest == tiles:  # nothing but split tiles: a cluster without a unit has no work
        most = min(most, rest * tile_units)
        units, extra = divmod(rest * tile_units, most)
    return WorkPlan(
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        group=min(config.raster_group, tiles_m),
        clusters=most if rest else min(most, tiles),
        k_blocks=k_blocks,
        first_tile=tiles - rest,
        tile_units=tile_units,
        units=units,
        extra=extra,
    )


class _Workspace(NamedTuple):
    """What stream-K passes between clusters: fp32 sums, and int32 flags that are zero between launches."""

    partials: Tensor
    flags: Tensor


_workspaces: dict[tuple[int, int], _Workspace] = {}


def workspace(flags: int, floats: int, device: torch.device) -> _Workspace:
    """The workspace of the current stream, whose launches take turns; inside a CUDA graph one of the graph's own."""

    def new() -> _Workspace:
        return _Workspace(
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(flags, dtype=torch.int32, device=device),
        )

    if torch.cuda.is_current_stream_capturing():
        return new()
    key = (device.index, stream(device.index))
    found = _workspaces.get(key)
    if found is None or found.flags.numel() < flags or found.partials.numel() < floats:
        found = _workspaces[key] = new()
    return found


class GemmLauncher:
    """gemm, gemm_relu2_24 and spgemm of one spec on one device."""

    def __init__(self, spec: KernelSpec, device: int) -> None:
        self.spec = spec
        self.size = footprint(spec.family.op, spec.family.dtype, spec.config)
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
        )
        block, grid = self._encoded(key)
        self.kernel.launch(grid, block.address, stream(self.kernel.device))

    def _encoded(self, key: tuple[Any, ...]) -> tuple[ArgumentBlock, int]:
        """The parameter block of these arguments, and the grid."""
        found = self._blocks.get(key)
        if found is None:
            found = self._encode(Arguments(*key))
            if len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.clear()
            self._blocks[key] = found
        return found

    def _workspace(self, m: int, n: int, k: int, device: torch.device) -> _Workspace | None:
        """Room for the partial sums of stream-K: one slot a consumer warpgroup; None where no tile is split."""
        c = self.spec.config
        plan = plan_work(c, m, n, k, self.sm_count)
        if plan.first_tile == plan.tiles:
            return None
        slots = plan.clusters * c.cluster_m * self.size.consumers
        return workspace(slots, slots * c.tile_n // 2 * WARPGROUP_THREADS, device)

    def _encode(self, x: Arguments) -> tuple[ArgumentBlock, int]:
        """GemmParams of ``params.cuh``, and the grid."""
        c = self.spec.config
        plan = plan_work(c, x.m, x.n, x.k, self.sm_count)
        pointers = (x.metadata, x.out, x.out_metadata, x.bias, x.residual, x.counts)
        content = b"".join(
            (
                *self._maps(x),
                struct.pack("<6Q2q4i", *pointers, x.out_stride, x.residual_stride, x.m, x.n, x.k, plan.k_blocks),
                struct.pack("<4i", plan.tiles, plan.tiles_n, plan.group, plan.tiles_m // plan.group),
                _fast_divmod(plan.group * plan.tiles_n),
                _fast_divmod(plan.group),
                _fast_divmod(plan.tiles_m % plan.group or plan.group),
                struct.pack("<4x3i", plan.first_tile, plan.units, plan.extra),
                _fast_divmod(plan.tile_units),
                struct.pack("<2Q", x.partials, x.flags),
                struct.pack("<4Q2q2i", *x.tokens),
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
        c, dtype = self.spec.config, self.spec.family.dtype
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


def stream(device: int) -> int:
    """The current stream's handle; torch's public way builds an object first, for 3 us."""
    return torch._C._cuda_getCurrentRawStream(device)


def row_stride(matrix: Tensor) -> int:
    """Elements between rows. Of a single row torch keeps any stride, and the TMA wants a multiple of 16 bytes."""
    return matrix.stride(0) if matrix.shape[0] > 1 else -(-matrix.shape[1] // 8) * 8


def _fast_divmod(divisor: int) -> bytes:
    """cutlass::FastDivmod (cutlass/fast_math.h): divides 31-bit numbers by a multiplication and a shift."""
    if divisor == 1:
        return struct.pack("<iII", 1, 0, 0)
    power = 31 + (divisor - 1).bit_length()
    return struct.pack("<iII", divisor, -(-(1 << power) // divisor), power - 32)


Launcher = GemmLauncher | SparsifyLauncher
