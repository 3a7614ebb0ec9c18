"""The 8-bit kernels: each step of docs/fp8.md on CUDA tensors, and the recipes made of these steps.

The operands are trusted, as in :mod:`srelu24.runtime.launch`. Scales are fp32, biases are converted to it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from srelu24.fp8.operands import FfnOperands
from srelu24.fp8.quantize import E4M3, E5M2
from srelu24.fp8.recipes import Predicted, Rowwise
from srelu24.numerics.dtypes import DTYPES, FragmentOrder
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.dispatch import launcher_of
from srelu24.runtime.launch import Operands, Scales
from srelu24_gen.spec import Activation, DType, Family, Op, Problem


def forward(o: FfnOperands) -> Tensor:
    """The op ``srelu24::ffn_fp8``: x [M, D] -> [M, D]."""
    x, w1, recipe = o.x, o.w1, o.recipe
    m, f = x.shape[0], w1.shape[0]
    out = torch.empty((m, o.w2.shape[0]), dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    # For each row the scale of X, and what the recipe needs: the scale of S, its inverse, the largest r.
    x_scale, s_scale, s_inverse, r_largest = torch.empty((4, m), dtype=torch.float32, device=x.device)
    xq = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = Scales(rows=x_scale)
    if recipe == Rowwise.name:
        scales.r_largest = r_largest
    elif recipe == Predicted.name:
        scales.row_norm, scales.s_scale, scales.s_inverse = o.basis, s_scale, s_inverse
        scales.bias_largest = None if o.b1 is None else o.b1.float().abs().amax()
    else:
        s_scale, s_inverse = o.basis[:1], o.basis[1:]
    quantize_rows(x, xq, scales)
    if recipe == Rowwise.name:
        r = Sparse24.empty(m, f, torch.bfloat16, x.device, FragmentOrder.BITS8)
        gemm_relu2_24(xq, w1, o.b1, r, Scales(a=x_scale, b=o.w1_scale, r_largest=r_largest))
        s = r.with_room_for(E4M3)
        square_rows(r, s, Scales(r_largest=r_largest, rows=s_scale))
    else:
        s = Sparse24.empty(m, f, E4M3, x.device)
        scales = Scales(a=x_scale, b=o.w1_scale, s_inverse=s_inverse, saturated=o.saturated)
        gemm_relu2_24(xq, w1, o.b1, s, scales)
    spgemm(s, o.w2, o.b2, out, Scales(a=s_scale, b=o.w2_scale))
    return out


def problems(
    recipe: str, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None
) -> tuple[Problem, ...]:
    """What :func:`forward` launches for x [M, D], in order."""
    (m, d), f = x.shape, w1.shape[0]
    rowwise = recipe == Rowwise.name
    to = torch.bfloat16 if rowwise else E4M3
    return (
        Problem(_row_family(Op.QUANTIZE_ROWS, x.dtype), m, d),
        Problem(_family(Op.GEMM_RELU2_24, weight=w1.dtype, out=to, bias=b1 is not None), m, f, d),
        *((Problem(_row_family(Op.SQUARE_ROWS, torch.bfloat16), m, f),) if rowwise else ()),
        Problem(_family(Op.SPGEMM, weight=w2.dtype, out=x.dtype, bias=b2 is not None), m, d, f),
    )


def row_amax(x: Tensor, w1: Tensor, w1_scale: Tensor, b1: Tensor | None) -> Tensor:
    """The largest value of each row of S, fp32 [M], for calibration."""
    m = x.shape[0]
    x_scale, r_largest = torch.zeros((2, m), dtype=torch.float32, device=x.device).unbind()
    if m:
        xq = torch.empty(x.shape, dtype=E4M3, device=x.device)
        quantize_rows(x, xq, Scales(rows=x_scale, r_largest=r_largest))
        r = Sparse24.empty(m, w1.shape[0], torch.bfloat16, x.device, FragmentOrder.BITS8)
        gemm_relu2_24(xq, w1, b1, r, Scales(a=x_scale, b=w1_scale, r_largest=r_largest))
    return r_largest.square()


def quantize_rows(x: Tensor, out: Tensor, scales: Scales) -> None:
    """x [M, K] in 16 bits to ``out``, e4m3 [M, K]. Writes ``scales.rows``, and those of the other scales that are
    there: what the recipe needs to know of each row."""
    family = _row_family(Op.QUANTIZE_ROWS, x.dtype)
    launcher_of(family, *x.shape, 0, x.device)(Operands(a=x, out=out, scales=scales))


def gemm_relu2_24(
    x: Tensor, w1: Tensor, bias: Tensor | None, out: Sparse24, scales: Scales, *, promote: bool = False
) -> None:
    """x [M, D] e4m3, w1 [F, D], to the kept r in bf16, or to S in e4m3. ``promote`` adds up partial sums of 128
    products in fp32."""
    family = _family(Op.GEMM_RELU2_24, weight=w1.dtype, out=out.dtype, bias=bias is not None, promote=promote)
    o = Operands(a=x, b=w1, bias=None if bias is None else bias.float(), out=out, scales=scales)
    launcher_of(family, x.shape[0], *w1.shape, x.device)(o)


def square_rows(r: Sparse24, out: Sparse24, scales: Scales) -> None:
    """The kept r in bf16 to S in e4m3, which has an E of its own. Writes ``scales.rows``."""
    family = _row_family(Op.SQUARE_ROWS, r.dtype)
    launcher_of(family, *r.shape, 0, r.device)(Operands(a=r, out=out, scales=scales))


def spgemm(
    s: Sparse24,
    w2: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scales: Scales,
    residual: Tensor | None = None,
    *,
    promote: bool = False,
) -> None:
    """S [M, F] e4m3, w2 [D, F], to ``out`` [M, D] in 16 bits; the residual has its type. ``promote`` adds up
    partial sums of 128 products in fp32."""
    family = _family(
        Op.SPGEMM,
        weight=w2.dtype,
        out=out.dtype,
        bias=bias is not None,
        residual=residual is not None,
        promote=promote,
    )
    bias = None if bias is None else bias.float()
    o = Operands(a=s, b=w2, bias=bias, residual=residual, out=out, scales=scales)
    launcher_of(family, s.shape[0], *w2.shape, out.device)(o)


@functools.cache
def _family(
    op: Op, *, weight: torch.dtype, out: torch.dtype, bias: bool, residual: bool = False, promote: bool = False
) -> Family:
    return Family(
        op,
        DType.E4M3,
        Activation.RELU2 if op is Op.GEMM_RELU2_24 else Activation.NONE,
        bias,
        residual,
        out=DType.E4M3 if out == E4M3 else DTYPES[out],
        weight=DType.E5M2 if weight == E5M2 else None,
        promote=promote,
    )


@functools.cache
def _row_family(op: Op, dtype: torch.dtype) -> Family:
    return Family(op, DTYPES[dtype], out=DType.E4M3)
