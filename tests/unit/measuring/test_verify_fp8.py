"""The check of 8-bit GEMMs accepts the reference's answers and refuses wrong values, metadata and padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srelu24.fp8 import reference
from srelu24.fp8.quantize import QuantizedRows
from srelu24.measuring import verify, workload
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.launch import Operands
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, DType, Family, Op, Problem

RELU2 = Activation.RELU2
FAMILIES = [
    Family(Op.GEMM_RELU2_24, DType.E4M3, RELU2, out=DType.E4M3),
    Family(Op.GEMM_RELU2_24, DType.E4M3, RELU2, bias=True, out=DType.BF16, weight=DType.E5M2),
    Family(Op.SPGEMM, DType.E4M3, out=DType.BF16),
    Family(Op.SPGEMM, DType.E4M3, bias=True, residual=True, out=DType.FP16),
    Family(Op.GEMM, DType.E4M3, out=DType.BF16, promote=True),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def answered(family: Family, m: int = 70, n: int = 272, k: int = 144) -> tuple[Problem, Operands]:
    """Operands with the reference's answer as their output."""
    problem = Problem(family, m, n, k)
    o = workload.operands_for(problem, 0.3, "cpu")
    assert o.scales is not None
    assert o.scales.a is not None
    assert o.scales.b is not None
    assert o.b is not None
    w = QuantizedRows(o.b, o.scales.b)
    if family.op is Op.GEMM_RELU2_24:
        assert isinstance(o.a, Tensor)
        assert isinstance(o.out, Sparse24)
        assert o.scales.s_inverse is not None
        r = reference.gemm_relu2_24(QuantizedRows(o.a, o.scales.a), w, o.bias)
        answer = r if family.out is DType.BF16 else reference.square_to_e4m3(r, o.scales.s_inverse)[0]
        o.out.values.copy_(answer.values)
        o.out.metadata.copy_(answer.metadata)
        return problem, o
    dense = o.a.to_dense() if isinstance(o.a, Sparse24) else o.a
    y = (dense.float() @ o.b.float().T) * o.scales.b * o.scales.a[:, None]
    for start in (o.bias, o.residual):
        y = y if start is None else y + start.float()
    assert isinstance(o.out, Tensor)
    o.out.copy_(y.to(TORCH_DTYPE[family.out or DType.BF16]))
    return problem, o


@families
@pytest.mark.parametrize(("m", "n", "k"), [(70, 272, 144), (1, 16, 16), (64, 256, 1024)])
def test_the_reference_is_right(family: Family, m: int, n: int, k: int) -> None:
    verdict = verify.check(*answered(family, m, n, k))
    assert verdict.ok, verdict.detail
    assert verdict.detail == f"{m * n} values within the bounds of 8-bit sums"


@families
def test_an_output_nobody_wrote_is_wrong(family: Family) -> None:
    problem = Problem(family, 70, 272, 144)
    assert not verify.check(problem, workload.operands_for(problem, 0.3, "cpu")).ok


def doubled(o: Operands) -> None:
    values = o.out.values if isinstance(o.out, Sparse24) else o.out
    row = values[40].float().abs()
    values[40, int(row.argmax())] = (2.5 * row.max()).to(values.dtype)


def one_nan(o: Operands) -> None:
    values = o.out.values if isinstance(o.out, Sparse24) else o.out
    values[3, 5] = torch.tensor(torch.nan).to(values.dtype)


def rows_swapped(o: Operands) -> None:
    values = o.out.values if isinstance(o.out, Sparse24) else o.out
    values.view(torch.uint8)[:2] = values.view(torch.uint8)[:2].flip(0)


@families
@pytest.mark.parametrize("spoil", [doubled, one_nan, rows_swapped])
def test_wrong_values_are_found(family: Family, spoil: Callable[[Operands], None]) -> None:
    problem, o = answered(family)
    spoil(o)
    verdict = verify.check(problem, o)
    assert not verdict.ok
    assert "wrong, the first at row" in verdict.detail


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_wrong_metadata_is_found(family: Family) -> None:
    for place, value, words in (((0, 0, 0, 0), 0, "nibble"), ((1, 1, 127, 3), 0, "padding")):
        problem, o = answered(family)
        assert isinstance(o.out, Sparse24)
        o.out.metadata[place] = value
        verdict = verify.check(problem, o)
        assert not verdict.ok
        assert words in verdict.detail


def test_operands_without_scales_are_refused() -> None:
    problem, o = answered(FAMILIES[2])
    o.scales = None
    with pytest.raises(Unsupported, match="give operands that have them"):
        verify.check(problem, o)
