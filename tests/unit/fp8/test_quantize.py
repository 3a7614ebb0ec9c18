"""8-bit floats: every rounding against an enumeration of the type, scales at both ends, weights that are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import srelu24
from srelu24.fp8 import quantize
from srelu24.fp8.quantize import E4M3, E5M2, LARGEST, QuantizedWeight
from srelu24_gen.errors import Unsupported

DTYPES = [E4M3, E5M2]
both = pytest.mark.parametrize("dtype", DTYPES)


def decode(byte: int, exponent_bits: int, bias: int) -> float:
    """A positive 8-bit float from its bits, by the definition of the format."""
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = byte >> mantissa_bits, (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return 2.0 ** (1 - bias) * mantissa if exponent == 0 else 2.0 ** (exponent - bias) * (1 + mantissa)


FINITE = {
    E4M3: [decode(byte, 4, 7) for byte in range(0x7F)],
    E5M2: [decode(byte, 5, 15) for byte in range(0x7C)],
}
"""Non-negative values in the order of their bits."""


def nearest(x: float, dtype: torch.dtype) -> int:
    """Bits of the nearest value, ties to even bits, saturating."""
    values = FINITE[dtype]
    return min(range(len(values)), key=lambda byte: (abs(values[byte] - x), byte % 2))


@both
def test_saturate_is_the_nearest_value(dtype: torch.dtype) -> None:
    """Every value, every midpoint, its neighbours, and what lies beyond, of both signs."""
    values = torch.tensor(FINITE[dtype])
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat(
        (values, middles, middles.nextafter(torch.zeros(())), middles.nextafter(values[-1:]), values[-1] + values)
    )
    expected = torch.tensor([nearest(float(x), dtype) for x in points], dtype=torch.uint8)
    assert torch.equal(quantize.saturate(points, dtype).view(torch.uint8), expected)
    negative = quantize.saturate(-points, dtype).view(torch.uint8)
    assert torch.equal(negative, expected | 0x80)


@both
def test_saturate_keeps_nan_and_bounds_infinity(dtype: torch.dtype) -> None:
    out = quantize.saturate(torch.tensor([torch.nan, torch.inf, -torch.inf]), dtype).float()
    assert out[0].isnan()
    assert out[1:].tolist() == [LARGEST[dtype], -LARGEST[dtype]]


def test_saturated_is_what_rounds_beyond_the_largest() -> None:
    beyond = torch.tensor([464.0]).nextafter(torch.tensor([1e9]))
    assert quantize.count_saturated(torch.tensor([448.0, 463.0, 464.0, -464.0, torch.nan])) == 0
    assert quantize.count_saturated(torch.tensor([float(beyond), -500.0, torch.inf])) == 3


@given(st.floats(2.0**-60, 2.0**60), st.integers(0, 2**31))
def test_rows_are_scaled_to_the_largest_value(size: float, seed: int) -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).mul_(size).bfloat16()
    rows = quantize.quantize_rows(x)
    assert (rows.values.float().abs().amax(dim=1) == 448).all()
    error = (rows.dequantize() - x.float()).abs()
    # Half a step of three mantissa bits, or of the smallest step the row has.
    assert (error <= x.float().abs() * 2.0**-4 * 1.001 + rows.scale[:, None] * 2.0**-10 * 1.001).all()


def test_a_row_of_zeros_and_a_row_below_the_floor() -> None:
    x = torch.zeros(3, 16)
    x[1, 3], x[2, 3] = 2.0**-97, 2.0**-130
    rows = quantize.quantize_rows(x)
    assert rows.values.float()[:, 3].tolist() == [0.0, 224.0, 0.0]
    assert (rows.scale == quantize.SMALLEST_AMAX / 448).all()
    assert rows.scale.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_lost_alone(bad: float) -> None:
    x = torch.ones(3, 16, dtype=torch.bfloat16)
    x[1, 5] = bad
    wide = quantize.quantize_rows(x).dequantize()
    assert wide[1].isnan().any()
    assert torch.equal(wide[[0, 2]], torch.ones(2, 16))


@both
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_weight_scales_each_output_channel(dtype: torch.dtype, source: torch.dtype) -> None:
    w = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).mul_(torch.tensor([[1e-3], [1], [0], [30], [1]]))
    w = w.to(source)
    q = srelu24.quantize_weight(w, dtype)
    assert (q.shape, q.dtype, q.scale.dtype) == ((5, 32), dtype, torch.float32)
    for row in (0, 1, 3, 4):
        amax = w[row].float().abs().max()
        assert q.scale[row] == torch.tensor(float(amax) / LARGEST[dtype])
        inverse = torch.tensor(LARGEST[dtype] / float(amax))  # divided in double, then rounded
        wanted = [nearest(abs(float(v)), dtype) for v in w[row].float() * inverse]
        assert (q.values[row].view(torch.uint8) & 0x7F).tolist() == wanted
    assert (q.values[2].float() == 0).all()
    assert torch.allclose(q.row_norm, q.dequantize().norm(dim=1).max())


@pytest.mark.parametrize(
    ("w", "dtype", "complaint"),
    [
        (torch.ones(4), E4M3, r"\[N, K\]"),
        (srelu24.quantize_weight(torch.ones(4, 4)), E4M3, "the weight is a QuantizedWeight"),
        (torch.ones(4, 4, dtype=torch.int8), E4M3, "torch.int8"),
        (torch.ones(4, 4), torch.bfloat16, "it can be torch.float8_e4m3fn or torch.float8_e5m2"),
        (torch.tensor([[1.0, torch.nan]]), E4M3, "NaN or Inf"),
        (torch.tensor([[1.0, torch.inf]]), E5M2, "NaN or Inf"),
    ],
)
def test_weights_that_are_refused(w: Tensor, dtype: torch.dtype, complaint: str) -> None:
    with pytest.raises(Unsupported, match=complaint):
        srelu24.quantize_weight(w, dtype)


def test_a_quantised_weight_must_fit_together() -> None:
    q = srelu24.quantize_weight(torch.ones(4, 16))
    with pytest.raises(Unsupported, match=r"use srelu24\.quantize_weight"):
        QuantizedWeight(q.values.float(), q.scale, q.row_norm)
    with pytest.raises(Unsupported, match=r"scale is torch.float32 \[3\]"):
        QuantizedWeight(q.values, q.scale[:3], q.row_norm)
    with pytest.raises(Unsupported, match=r"row_norm is torch.float64"):
        QuantizedWeight(q.values, q.scale, q.row_norm.double())
    assert repr(q.to("cpu")) == "QuantizedWeight(4x16, torch.float8_e4m3fn, cpu)"


@given(st.floats(2.0**-90, 2.0**90, width=32), st.sampled_from(DTYPES))
def test_scales_are_divided_exactly_once(amax: float, dtype: torch.dtype) -> None:
    """As the kernels do: the nearest fp32 number to the quotient."""
    assert float(quantize.scale(torch.tensor(amax), dtype)) == float(torch.tensor(amax / LARGEST[dtype]))
    assert float(quantize.inverse_scale(torch.tensor(amax), dtype)) == float(torch.tensor(LARGEST[dtype] / amax))
