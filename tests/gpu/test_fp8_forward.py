"""The 8-bit forward against docs/fp8.md: near float64, row by row, under graphs and through the public function."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from torch import Tensor

import srelu24
from srelu24.fp8 import kernels, quantize, reference
from srelu24.fp8.operands import FfnOperands
from srelu24.measuring.workload import make_ffn
from srelu24_gen.spec import WIDE_TYPES, Activation, DType, Family, Op, Problem

M, D, F = 300, 512, 1296
_GEMMS = [
    dataclasses.replace(family, bias=bias)
    for family in (
        Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, out=DType.E4M3),
        Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, out=DType.BF16),
        Family(Op.SPGEMM, DType.E4M3, out=DType.BF16),
    )
    for bias in (False, True)
]
PROBLEMS = [
    Problem(family, m, *((F, D) if family.op is Op.GEMM_RELU2_24 else (D, F))) for m in (1, M) for family in _GEMMS
]


def seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# -------------------------------------------------------------------------------------------------- the whole forward


@dataclasses.dataclass
class Layer:
    x: Tensor
    w1: quantize.QuantizedWeight
    w2: quantize.QuantizedWeight
    b1: Tensor | None
    b2: Tensor | None
    amax: Tensor
    """fp32 [], for the static recipe."""
    saturated: Tensor

    def run(self, recipe: str, x: Tensor | None = None) -> Tensor:
        basis = self.w1.row_norm
        if recipe == "static":
            basis = torch.stack((quantize.scale(self.amax), quantize.inverse_scale(self.amax)))
        operands = FfnOperands(
            x=self.x if x is None else x,
            w1=self.w1.values,
            w1_scale=self.w1.scale,
            w2=self.w2.values,
            w2_scale=self.w2.scale,
            b1=self.b1,
            b2=self.b2,
            recipe=recipe,
            basis=basis,
            saturated=self.saturated,
        )
        return kernels.forward(operands)

    def reference(self, recipe: str, accumulate: torch.dtype) -> Tensor:
        r = reference.gemm_relu2_24(quantize.quantize_rows(self.x), self.w1, self.b1, accumulate=accumulate)
        if recipe == "rowwise":
            amax = reference.row_amax(r.values)
        elif recipe == "predicted":
            amax = reference.predicted_amax(self.x, self.w1.row_norm, self.b1)
        else:
            amax = self.amax
        s, _ = reference.square_to_e4m3(r, quantize.inverse_scale(amax))
        scale = quantize.scale(amax)
        return reference.spgemm(s, scale, self.w2, self.b2, dtype=self.x.dtype, accumulate=accumulate)

    def exact(self) -> Tensor:
        """float64 with the quantised weights, pruned."""
        h = self.x.double() @ self.w1.dequantize().double().T
        h = (h if self.b1 is None else h + self.b1.double()).clamp(min=0)
        groups = h.view(*h.shape[:-1], -1, 4)
        kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0)
        y = (groups.square() * kept).view_as(h) @ self.w2.dequantize().double().T
        return y if self.b2 is None else y + self.b2.double()


def layer(
    device: torch.device, dtype: DType = DType.BF16, m: int = M, d: int = D, f: int = F, density: float = 0.1,
    bias: bool = False,
) -> Layer:  # fmt: skip
    data = make_ffn(m, d, f, dtype, density, device)
    b1, b2 = (torch.randn(n, generator=seeded(n, device), device=device).mul(0.1).to(data.x.dtype) for n in (f, d))
    w1, w2 = quantize.quantize_weight(data.w1), quantize.quantize_weight(data.w2)
    amax = 1.5 * torch.nn.functional.linear(data.x, data.w1).relu().square().max().float()
    saturated = torch.zeros((), dtype=torch.int64, device=device)
    return Layer(data.x, w1, w2, b1 if bias else None, b2 if bias else None, amax, saturated)


def row_errors(y: Tensor, truth: Tensor) -> Tensor:
    return (y.double() - truth).norm(dim=1) / truth.norm(dim=1)


RECIPES = ["rowwise", "predicted", "static"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("dtype", WIDE_TYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_is_as_near_float64_as_the_reference(
    recipe: str, dtype: DType, density: float, bias: bool, device: torch.device
) -> None:
    case = layer(device, dtype, density=density, bias=bias)
    y, truth = case.run(recipe), case.exact()
    ours, theirs = row_errors(y, truth), row_errors(case.reference(recipe, torch.float64), truth)
    assert ours.median() < 1.1 * theirs.median()
    assert (ours < 0.3).all()
    assert case.saturated == 0
    # And as near the reference as the tensor cores' short sums and the choices that follow allow.
    assert row_errors(y, case.reference(recipe, torch.float64).double()).median() < 0.03


@pytest.mark.parametrize("recipe", ["rowwise", "predicted"])
def test_outlier_tiny_and_zero_rows(recipe: str, device: torch.device) -> None:
    case = layer(device)
    case.x[3] *= 1000
    case.x[5] *= 1e-6
    case.x[7] = 0
    y, truth = case.run(recipe), case.exact()
    assert row_errors(y, truth)[[3, 5, 20]].max() < 0.2
    assert (y[7] == 0).all()
    assert y.isfinite().all()
    assert case.saturated == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(recipe: str, bad: float, device: torch.device) -> None:
    case = layer(device)
    good = case.run(recipe)
    case.x[11, 100] = bad
    y = case.run(recipe)
    others = torch.arange(M, device=device) != 11
    assert torch.equal(y[others], good[others])
    assert y[11].isnan().all()


def test_static_counts_what_saturates(device: torch.device) -> None:
    case = layer(device)
    case.amax /= 50
    y = case.run("static")
    assert y.isfinite().all()
    r = reference.gemm_relu2_24(quantize.quantize_rows(case.x), case.w1, accumulate=torch.float64)
    _, expected = reference.square_to_e4m3(r, quantize.inverse_scale(case.amax))
    assert expected > 100
    assert abs(int(case.saturated) - int(expected)) <= 0.02 * int(expected) + 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_run_gives_the_same_bits(recipe: str, device: torch.device) -> None:
    case = layer(device, m=1000)
    first = case.run(recipe)
    assert all(torch.equal(case.run(recipe), first) for _ in range(5))


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_a_cuda_graph(recipe: str, device: torch.device) -> None:
    case = layer(device, bias=True)
    other = case.x.flip(0).contiguous()
    eager = case.run(recipe, other)
    static = case.x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run(recipe, static)
    static.copy_(other)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, eager)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("m", [0, 1])
def test_no_token_and_one(recipe: str, m: int, device: torch.device) -> None:
    case = layer(device)
    y = case.run(recipe, case.x[:m])
    assert y.shape == (m, D)
    assert torch.allclose(y, case.run(recipe)[:m], rtol=0.1, atol=0.1)  # tiles differ in the order of sums


# ------------------------------------------------------------------------------------------------- the public function


@pytest.mark.parametrize("recipe", RECIPES)
def test_ffn_runs_these_kernels(recipe: str, device: torch.device) -> None:
    case = layer(device, bias=True)
    chosen = srelu24.Static(float(case.amax)) if recipe == "static" else recipe

    def ffn(x: Tensor) -> Tensor:
        return srelu24.ffn(x, case.w1, case.w2, case.b1, case.b2, recipe=chosen)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ffn(case.x.view(3, M // 3, D))
    assert torch.equal(y.view(M, D), case.run(recipe))
    assert torch.equal(torch.compile(ffn, fullgraph=True, backend="aot_eager")(case.x), case.run(recipe))
    found = srelu24.explain(case.x, case.w1, case.w2, case.b1, case.b2, recipe=chosen)
    assert found.runs == "kernels"
    assert len(found.kernels) == (4 if recipe == "rowwise" else 3)


def test_calibration_on_the_gpu(device: torch.device) -> None:
    case = layer(device)
    static = srelu24.Static()
    srelu24.calibrate(lambda x: srelu24.ffn(x, case.w1, case.w2, recipe=static), [case.x[:100], case.x])
    r = reference.gemm_relu2_24(quantize.quantize_rows(case.x), case.w1, accumulate=torch.float64)
    assert static.amax == pytest.approx(float(reference.row_amax(r.values).amax()), rel=0.03)


def test_rows_that_the_kernels_cannot_read_run_dense(device: torch.device) -> None:
    case = layer(device)
    wide = torch.zeros(M, D + 4, dtype=case.x.dtype, device=device)
    wide[:, :D] = case.x
    with pytest.warns(srelu24.FallbackWarning, match="row stride"):
        y = srelu24.ffn(wide[:, :D], case.w1, case.w2, recipe="rowwise")
    assert y.shape == (M, D)
