"""The 8-bit reference against arithmetic written out here: integers that are exact in every step, and a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from srelu24.fp8 import quantize, reference
from srelu24.fp8.quantize import E4M3, QuantizedRows, QuantizedWeight
from srelu24.numerics import reference as reference16
from srelu24.numerics.dtypes import FragmentOrder
from srelu24.numerics.sparse24 import Sparse24, unpack_metadata


def integers(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def weight(values: Tensor, scale: Tensor) -> QuantizedWeight:
    return QuantizedWeight(values.to(E4M3), scale, torch.zeros(()))


def packed_of(r: Tensor) -> Sparse24:
    return reference16.prune24(r, order=FragmentOrder.BITS8)


def slow_pruned(r: Tensor) -> Tensor:
    """The two largest of every four, lower index first, one group at a time."""
    out = torch.zeros_like(r)
    for row in range(r.shape[0]):
        for group in range(0, r.shape[1], 4):
            order = sorted(range(4), key=lambda p: (-float(r[row, group + p]), p))
            for p in order[:2]:
                out[row, group + p] = r[row, group + p]
    return out


@pytest.mark.parametrize("bias", [False, True])
def test_gemm1_of_integers(bias: bool) -> None:
    m, d, f = 5, 32, 48
    x, w = integers(m, d, 0), integers(f, d, 1)
    xs, ws = torch.tensor([0.5, 1, 2, 4, 8]), 2.0 ** (torch.arange(f) % 3)
    b = integers(1, f, 2)[0].bfloat16() if bias else None
    packed = reference.gemm_relu2_24(QuantizedRows(x.to(E4M3), xs), weight(w, ws), b)
    y = (x @ w.T) * ws * xs[:, None] + (0 if b is None else b.float())
    assert (packed.order, packed.dtype) == (FragmentOrder.BITS8, torch.bfloat16)
    assert torch.equal(packed.to_dense().float(), slow_pruned(y.clamp(min=0).bfloat16().float()))


def test_selection_is_on_bf16_values() -> None:
    """256 and 257 tie in bf16, so the lower index stays; in fp32 the larger would."""
    x = QuantizedRows(torch.eye(16).to(E4M3), torch.ones(16))
    w = torch.zeros(16, 16)
    w[0:3, 0] = torch.tensor([1.0, 1.0, 1.0])
    scales = torch.ones(16)
    scales[0:3] = torch.tensor([256.0, 256.0, 257.0])
    packed = reference.gemm_relu2_24(x, weight(w, scales))
    assert packed.to_dense()[0, :4].tolist() == [256.0, 256.0, 0.0, 0.0]


def test_s_is_squared_scaled_and_rounded_once() -> None:
    r = torch.rand(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    r[1] *= 1e-6
    r[2] *= 1000
    r[3] = 0
    packed = packed_of(r)
    amax = reference.row_amax(packed.values)
    assert torch.equal(amax, r.float().amax(dim=1).square())
    s, saturated = reference.square_to_e4m3(packed, quantize.inverse_scale(amax))
    assert saturated == 0
    assert s.dtype == E4M3
    kept = slow_pruned(r.float())
    floor = amax.clamp(min=2.0**-96)
    for row in range(6):
        wanted = [
            float(torch.tensor(v * v * float(torch.tensor(448 / float(floor[row])))).to(E4M3))
            for v in kept[row].tolist()
        ]
        assert s.to_dense()[row].float().tolist() == wanted
    assert torch.equal(
        unpack_metadata(s.metadata, 6, 64, s.order), unpack_metadata(packed.metadata, 6, 64, packed.order)
    )


def test_a_scale_that_is_too_small_saturates_and_counts() -> None:
    packed = packed_of(torch.tensor([[1.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0] * 2]).bfloat16())
    s, saturated = reference.square_to_e4m3(packed, quantize.inverse_scale(torch.tensor(4.0)))
    assert saturated == 2  # the 9s; 4 is the largest expected
    assert s.to_dense().float()[0, :5].tolist() == [112.0, 448.0, 0.0, 0.0, 448.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemm2_of_integers(dtype: torch.dtype) -> None:
    m, d, f = 3, 16, 32
    h = integers(m, f, 3).abs().bfloat16()
    s, _ = reference.square_to_e4m3(packed_of(h), torch.tensor(1.0))
    w, ws, ss = integers(d, f, 4), 2.0 ** (torch.arange(d) % 4), torch.tensor([1.0, 0.25, 2.0])
    bias, residual = integers(1, d, 5)[0].to(dtype), integers(m, d, 6).to(dtype)
    y = reference.spgemm(s, ss, weight(w, ws), bias, residual, dtype=dtype)
    wanted = (slow_pruned(h.float()) ** 2 @ w.T) * ws * ss[:, None] + bias.float() + residual.float()
    assert torch.equal(y, wanted.to(dtype))


def test_the_predicted_bound_holds_where_it_is_tight() -> None:
    """Rows of W1 along rows of X, and a bias: hidden values come as close to the bound as they can."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    w1 = quantize.quantize_weight(torch.nn.functional.normalize(x[:32].float()) * 3)
    bias = torch.full((32,), 0.5, dtype=torch.bfloat16)
    r = reference.gemm_relu2_24(quantize.quantize_rows(x), w1, bias)
    bound, largest = reference.predicted_amax(x, w1.row_norm, bias), reference.row_amax(r.values)
    assert (largest <= bound).all()
    assert ((largest / bound)[:32] > 0.7).all()  # it is a bound for these rows, and hardly more
    assert reference.square_to_e4m3(r, quantize.inverse_scale(bound))[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(bad: float) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    w1 = quantize.quantize_weight(torch.randn(16, 32, generator=torch.Generator().manual_seed(3)))
    w2 = quantize.quantize_weight(torch.randn(32, 16, generator=torch.Generator().manual_seed(4)))

    def forward(x: Tensor) -> Tensor:
        r = reference.gemm_relu2_24(quantize.quantize_rows(x), w1)
        amax = reference.row_amax(r.values)
        return reference.spgemm(reference.square_to_e4m3(r, quantize.inverse_scale(amax))[0], quantize.scale(amax), w2)

    good = forward(x)
    x[2, 7] = bad
    y = forward(x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], good[[0, 1, 3]])
