"""What a kernel is launched on: its operands as tensors, and a GEMM's arguments as numbers; and the parameter block
that the mma.sync kernels take of these numbers.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.loader import ArgumentBlock
from srelu24.runtime.parameters import FAST_DIVMOD, GEMM_PARAMS_SM80, RASTER_PARAMS, SCALE_PARAMS, SPLIT_K_PARAMS
from srelu24_gen.bindings import E_VECTOR_COLUMNS, PACKING_OPS
from srelu24_gen.spec import KernelSpec
from srelu24_gen.work_plan import WorkPlan, plan_work


@dataclass(slots=True, kw_only=True)
class Scales:
    """What a kernel of docs/fp8.md needs besides its operands. Each kernel reads or writes some of the fields.

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


@dataclass(slots=True, kw_only=True)  # not frozen: that would cost a microsecond a launch
class Operands:
    """The tensors of one launch, all on one CUDA device. Shapes as in :class:`srelu24_gen.spec.Op`.

    a: [M, K], last dimension contiguous; a Sparse24 of shape (M, K) for spgemm.
    b: [N, K], last dimension contiguous (none for sparsify24).
    bias: [N]. residual: [M, N], last dimension contiguous. counts: int32 [N], added to.
    out: [M, N]; a Sparse24 of shape (M, N) for gemm_relu2_24, sparsify24 and square_rows. Written whole.
    scales: of the 8-bit kernels. Their bias is fp32.
    """

    a: Tensor | Sparse24
    out: Tensor | Sparse24
    b: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    counts: Tensor | None = None
    scales: Scales | None = None


class ScaleArguments(NamedTuple):
    """The fields of ScaleParams (``scale.cuh``): addresses, and the steps from one row's value to the next."""

    a: int
    b: int
    s_inverse: int
    r_largest: int
    saturated: int
    a_step: int
    s_inverse_step: int


class TokenArguments(NamedTuple):
    """The fields of TokenParams (``sm90/params.cuh``): addresses, row strides in elements, and the steps that
    :func:`srelu24.training.kernels.row_steps` gives."""

    values: int
    metadata: int
    s: int
    s_metadata: int
    stride: int
    s_stride: int
    row_step: int
    block_step: int


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
    scales: ScaleArguments | None = None
    """Of the 8-bit kernels."""
    tokens: TokenArguments | None = None
    """Of the training kernels."""


def row_stride(matrix: Tensor) -> int:
    """Elements between rows. Of a single row torch keeps any stride, and the TMA wants a multiple of 16 bytes."""
    step = 16 // matrix.itemsize
    return matrix.stride(0) if matrix.shape[0] > 1 else -(-matrix.shape[1] // step) * step


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 is the null pointer of one that is not there."""
    return 0 if tensor is None else tensor.data_ptr()


def scale_arguments(s: Scales) -> ScaleArguments:
    """The scales as a GEMM takes them. One scale for all rows has a step of 0."""
    a, s_inverse = s.a, s.s_inverse
    return ScaleArguments(
        a=address(a),
        b=address(s.b),
        s_inverse=address(s_inverse),
        r_largest=address(s.r_largest),
        saturated=address(s.saturated),
        a_step=int(a is not None and a.numel() > 1),
        s_inverse_step=int(s_inverse is not None and s_inverse.numel() > 1),
    )


def scale_params(scales: ScaleArguments | None) -> bytes:
    """ScaleParams of ``scale.cuh``."""
    return SCALE_PARAMS.zeros() if scales is None else SCALE_PARAMS.pack(**scales._asdict())


def fast_divmod(divisor: int) -> bytes:
    """FastDivmod of ``cutlass/fast_math.h``: divides 31-bit numbers by a multiplication and a shift."""
    if divisor == 1:
        return FAST_DIVMOD.pack(divisor=1, multiplier=0, shift_right=0)
    power = 31 + (divisor - 1).bit_length()
    return FAST_DIVMOD.pack(divisor=divisor, multiplier=-(-(1 << power) // divisor), shift_right=power - 32)


def raster_params(plan: WorkPlan) -> bytes:
    """RasterParams of ``raster.cuh``."""
    return RASTER_PARAMS.pack(
        tiles=plan.tiles,
        tiles_n=plan.tiles_n,
        group=plan.group,
        full_bands=plan.tiles_m // plan.group,
        band=fast_divmod(plan.group * plan.tiles_n),
        height=fast_divmod(plan.group),
        last_height=fast_divmod(plan.tiles_m % plan.group or plan.group),
    )


class SlicedPlan(NamedTuple):
    """The tiles of an mma.sync kernel, whole, and how many CTAs share each along K."""

    work: WorkPlan
    slices: int


def plan_mma_sync(spec: KernelSpec, m: int, n: int, k: int, sm_count: int) -> SlicedPlan:
    """One CTA for each tile; with ``stream_k`` enough to occupy every multiprocessor, unless that would cut a tile into
    more slices than the square root of its units of K. A packed output is planned in whole vectors of E."""
    if spec.family.op in PACKING_OPS:
        n = -(-n // E_VECTOR_COLUMNS) * E_VECTOR_COLUMNS
    work = plan_work(dataclasses.replace(spec.config, stream_k=False), m, n, k, sm_count)
    most = min(sm_count // work.tiles, math.isqrt(work.tile_units)) if spec.config.stream_k else 1
    return SlicedPlan(work, max(1, most))


def encode_mma_sync(spec: KernelSpec, x: Arguments, sm_count: int) -> tuple[ArgumentBlock, int]:
    """GemmParams of ``sm80/params.cuh``, and the grid."""
    plan, slices = plan_mma_sync(spec, x.m, x.n, x.k, sm_count)
    units, extra = divmod(plan.tile_units, slices)
    content = GEMM_PARAMS_SM80.pack(
        a=x.a,
        b=x.b,
        metadata=x.metadata,
        out=x.out,
        out_metadata=x.out_metadata,
        bias=x.bias,
        residual=x.residual,
        counts=x.counts,
        a_stride=x.a_stride,
        b_stride=x.b_stride,
        out_stride=x.out_stride,
        residual_stride=x.residual_stride,
        m=x.m,
        n=x.n,
        k=x.k,
        k_blocks=plan.k_blocks,
        raster=raster_params(plan),
        scale=scale_params(x.scales),
        split=SPLIT_K_PARAMS.pack(
            slices=fast_divmod(slices), units=units, extra=extra, partials=x.partials, flags=x.flags
        ),
    )
    return ArgumentBlock(content), plan.tiles * slices
