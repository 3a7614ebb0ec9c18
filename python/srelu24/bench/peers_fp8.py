"""The 8-bit forward's kernels and what they are measured against. What each peer is and why: docs/benchmarks.md.

The kernels are called directly, and every output is held to the reference of docs/fp8.md, or, for dense peers, to the
same arithmetic in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from srelu24.bench.peers import Case, Peer, Run
from srelu24.fp8 import kernels, quantize, reference
from srelu24.fp8.operands import FfnOperands
from srelu24.fp8.quantize import E4M3, LARGEST, SMALLEST_AMAX, QuantizedRows, QuantizedWeight
from srelu24.measuring.verify import exact_float32
from srelu24.numerics.dtypes import FragmentOrder
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.launch import Scales
from srelu24_gen.errors import Unsupported

RECIPES = ("rowwise", "predicted", "static")
TOLERANCE = 4e-2
"""Relative error (Frobenius norm) allowed against the reference: 8-bit sums are short of bits in the tensor cores, and
where that moves a value over a rounding boundary of e4m3, it moves by 6 %."""

_CHUNK_ROWS = 2048


class Fp8Case(Case):
    """A case with quantised weights, and with every intermediate of the 8-bit forward."""

    speed = 2

    @cached_property
    def q1(self) -> QuantizedWeight:
        return quantize.quantize_weight(self.w1)

    @cached_property
    def q2(self) -> QuantizedWeight:
        return quantize.quantize_weight(self.w2)

    @cached_property
    def xq(self) -> QuantizedRows:
        return quantize.quantize_rows(self.x)

    @cached_property
    def r(self) -> Sparse24:
        """The kept r, bf16, by the reference."""
        packed = Sparse24.empty(self.shape.m, self.shape.f, torch.bfloat16, self.x.device, FragmentOrder.BITS8)
        for start in range(0, self.shape.m, _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            with exact_float32():
                part = reference.gemm_relu2_24(QuantizedRows(self.xq.values[rows], self.xq.scale[rows]), self.q1)
            packed.values[rows] = part.values
            packed.metadata[start // 64 : (start + _CHUNK_ROWS) // 64] = part.metadata
        return packed

    @cached_property
    def amax(self) -> Tensor:
        """Of each row of S, [M]."""
        return reference.row_amax(self.r.values)

    @cached_property
    def s8(self) -> Sparse24:
        """S in e4m3, scaled row by row."""
        return reference.square_to_e4m3(self.r, quantize.inverse_scale(self.amax))[0]

    @cached_property
    def act8(self) -> QuantizedRows:
        """The zero-rich activations of the dense 8-bit FFN, as its second GEMM gets them."""
        return quantize.quantize_rows(self.h8.relu().square())

    @cached_property
    def static_basis(self) -> Tensor:
        """Calibrated on the data itself."""
        amax = self.amax.amax()
        return torch.stack((quantize.scale(amax), quantize.inverse_scale(amax)))

    @cached_property
    def y_sparse(self) -> Tensor:
        """The forward with row-wise scales, [M, D], float32 sums. Other recipes differ by the rounding of S."""
        return self._product(self.s8.to_dense(), quantize.scale(self.amax), self.q2)

    @cached_property
    def y_dense8(self) -> Tensor:
        """The dense FFN in row-wise scaled e4m3, [M, D]."""
        return self._product(self.act8.values, self.act8.scale, self.q2)

    @cached_property
    def h8(self) -> Tensor:
        """GEMM1 without epilogue, [M, F]."""
        return self._product(self.xq.values, self.xq.scale, self.q1).bfloat16()

    @cached_property
    def cusparselt_gemm8(self) -> Callable[[], Tensor]:
        """S W2^T by cuSPARSELt in e4m3, its algorithm searched, S compressed beforehand; unscaled, in bf16.

        Raises:
            Unsupported: this PyTorch has no cuSPARSELt.
            RuntimeError: cuSPARSELt refuses the shape or the type.
        """
        if not torch.backends.cusparselt.is_available():
            raise Unsupported("this PyTorch build has no cuSPARSELt; install one from the official CUDA wheels")
        compressed = torch._cslt_compress(self.s8.to_dense())
        w2t = self.q2.values.T
        algorithm = torch._cslt_sparse_mm_search(compressed, w2t, out_dtype=torch.bfloat16)
        return lambda: torch._cslt_sparse_mm(compressed, w2t, out_dtype=torch.bfloat16, alg_id=algorithm)

    @cached_property
    def unscaled(self) -> Tensor:
        """What cuSPARSELt has to give, [M, D]."""
        one = torch.ones(1, device=self.x.device)
        return self._product(
            self.s8.to_dense(), one.expand(self.shape.m), QuantizedRows(self.q2.values, one.expand(self.shape.d))
        )

    @staticmethod
    def _product(a: Tensor, scale: Tensor, w: QuantizedRows) -> Tensor:
        with exact_float32():
            wide = w.values.float().T
            parts = zip(torch.split(a, _CHUNK_ROWS), torch.split(scale, _CHUNK_ROWS), strict=True)
            return torch.cat([(rows.float() @ wide) * w.scale * s[:, None] for rows, s in parts])


def scaled_linear(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """x [M, K] times a quantised weight by ``torch._scaled_mm``, x quantised row by row: what users write today."""
    amax = x.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_AMAX)
    largest = LARGEST[E4M3]
    values = (x.float() * (largest / amax)).clamp(-largest, largest).to(E4M3)
    return torch._scaled_mm(
        values, w.t(), scale_a=amax / largest, scale_b=w_scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def scaled_ffn(x: Tensor, w1: Tensor, w1_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> Tensor:
    """The dense FFN of two such layers."""
    return scaled_linear(scaled_linear(x, w1, w1_scale).relu().square(), w2, w2_scale)


def _recipe(recipe: str) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        assert isinstance(case, Fp8Case)
        basis = case.static_basis if recipe == "static" else case.q1.row_norm
        operands = FfnOperands(
            x=case.x,
            w1=case.q1.values,
            w1_scale=case.q1.scale,
            w2=case.q2.values,
            w2_scale=case.q2.scale,
            b1=None,
            b2=None,
            recipe=recipe,
            basis=basis,
            saturated=torch.zeros((), dtype=torch.int64, device=case.x.device),
        )
        return lambda: kernels.forward(operands)

    return build


def _of(build: Callable[[Fp8Case], Run]) -> Callable[[Case], Run]:
    def checked(case: Case) -> Run:
        assert isinstance(case, Fp8Case)
        return build(case)

    return checked


def _expect(wanted: Callable[[Fp8Case], Tensor]) -> Callable[[Case], Tensor]:
    def checked(case: Case) -> Tensor:
        assert isinstance(case, Fp8Case)
        return wanted(case)

    return checked


def _torch_compile(case: Fp8Case) -> Run:
    """TorchInductor fuses quantisation and activation into kernels between cuBLAS's row-wise scaled GEMMs."""
    torch.compiler.reset()
    compiled = torch.compile(scaled_ffn, dynamic=False)
    return lambda: compiled(case.x, case.q1.values, case.q1.scale, case.q2.values, case.q2.scale)


def _scaled_gemm(a: QuantizedRows, w: QuantizedWeight) -> Run:
    scales = {"scale_a": a.scale[:, None], "scale_b": w.scale[None]}
    return lambda: torch._scaled_mm(
        a.values, w.values.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )  # fmt: skip


def _gemm1(to: torch.dtype, promote: bool = False) -> Callable[[Fp8Case], Run]:
    def build(case: Fp8Case) -> Run:
        out = Sparse24.empty(case.shape.m, case.shape.f, to, case.x.device, FragmentOrder.BITS8)
        scales = Scales(a=case.xq.scale, b=case.q1.scale)
        if to == E4M3:
            scales.s_inverse = quantize.inverse_scale(case.amax)
            scales.saturated = torch.zeros((), dtype=torch.int64, device=case.x.device)
        else:
            scales.r_largest = torch.zeros(case.shape.m, device=case.x.device)

        def run() -> Sparse24:
            kernels.gemm_relu2_24(case.xq.values, case.q1.values, None, out, scales, promote=promote)
            return out

        return run

    return build


def _gemm2(promote: bool = False) -> Callable[[Fp8Case], Run]:
    def build(case: Fp8Case) -> Run:
        out = torch.empty(case.shape.m, case.shape.d, dtype=torch.bfloat16, device=case.x.device)
        scales = Scales(a=quantize.scale(case.amax), b=case.q2.scale)

        def run() -> Tensor:
            kernels.spgemm(case.s8, case.q2.values, None, out, scales, promote=promote)
            return out

        return run

    return build


def _quantize_rows(case: Fp8Case) -> Run:
    out = torch.empty(case.x.shape, dtype=E4M3, device=case.x.device)
    scales = Scales(rows=torch.empty(case.shape.m, device=case.x.device))

    def run() -> Tensor:
        kernels.quantize_rows(case.x, out, scales)
        return out

    return run


def _square_rows(case: Fp8Case) -> Run:
    s = case.r.with_room_for(E4M3)
    scales = Scales(r_largest=case.amax.sqrt(), rows=torch.empty(case.shape.m, device=case.x.device))

    def run() -> Tensor:
        kernels.square_rows(case.r, s, scales)
        return s.values  # not s, whose E is that of case.r: what checks the output would overwrite it

    return run


def _copy(case: Fp8Case) -> Run:
    copy = torch.empty_like(case.x)
    return lambda: copy.copy_(case.x)


FFN = (
    *(Peer(recipe, _recipe(recipe), _expect(lambda case: case.y_sparse), TOLERANCE) for recipe in RECIPES),
    Peer("torch_compile", _of(_torch_compile), _expect(lambda case: case.y_dense8), TOLERANCE),
)
GEMM = (
    Peer("gemm1_e4m3", _of(_gemm1(E4M3)), _expect(lambda case: case.s8.to_dense().float()), TOLERANCE),
    Peer("gemm1_promoted", _of(_gemm1(E4M3, True)), _expect(lambda case: case.s8.to_dense().float()), TOLERANCE),
    Peer("gemm1_bf16", _of(_gemm1(torch.bfloat16)), _expect(lambda case: case.r.to_dense()), TOLERANCE),
    Peer("gemm1_cublas", _of(lambda case: _scaled_gemm(case.xq, case.q1)), _expect(lambda case: case.h8), TOLERANCE),
    Peer("gemm2_sparse", _of(_gemm2()), _expect(lambda case: case.y_sparse), TOLERANCE),
    Peer("gemm2_promoted", _of(_gemm2(True)), _expect(lambda case: case.y_sparse), TOLERANCE),
    Peer(
        "gemm2_cublas",
        _of(lambda case: _scaled_gemm(case.act8, case.q2)),
        _expect(lambda case: case.y_dense8),
        TOLERANCE,
    ),
    Peer("gemm2_cusparselt", _of(lambda case: case.cusparselt_gemm8), _expect(lambda case: case.unscaled), TOLERANCE),
)
MEMORY = (
    Peer("quantize_rows", _of(_quantize_rows), _expect(lambda case: case.xq.values.float()), TOLERANCE),
    Peer("square_rows", _of(_square_rows), _expect(lambda case: case.s8.values.float()), TOLERANCE),
    Peer("copy", _of(_copy), _expect(lambda case: case.x), TOLERANCE),
)
