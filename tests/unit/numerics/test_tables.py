"""The tables of storage types and of activations: complete, and asked everywhere instead of repeated."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import srelu24
from srelu24.measuring import verify
from srelu24.numerics import activations, dtypes, reference
from srelu24.numerics.activations import ActivationRule, rule_of
from srelu24.numerics.dtypes import STORAGE_TYPES, row_of
from srelu24.ops import library
from srelu24.runtime import dense
from srelu24.runtime.launch import Operands
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import WIDE_TYPES, Activation, DType, Family, Op, Problem

PACKAGE = Path(srelu24.__file__).parent
ONE_ROW_EACH = ("numerics/dtypes.py", "numerics/activations.py")


def test_every_type_and_every_activation_has_a_row() -> None:
    assert set(STORAGE_TYPES) == set(DType)
    assert set(activations.ACTIVATION_RULES) == set(Activation)
    for dtype in WIDE_TYPES:
        row = STORAGE_TYPES[dtype]
        assert None not in (row.infinity, row.order, row.tma, row.step, row.tolerance)


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if STORAGE_TYPES[dtype].infinity is not None])
def test_the_bits_of_infinity(dtype: DType) -> None:
    row = STORAGE_TYPES[dtype]
    bits = torch.tensor([row.infinity], dtype=row.bits)
    assert row.bits.itemsize == row.torch_dtype.itemsize == dtype.bytes
    assert bits.view(row.torch_dtype).float().tolist() == [torch.inf]


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if STORAGE_TYPES[dtype].largest is not None])
def test_the_largest_value_is_pytorchs(dtype: DType) -> None:
    row = STORAGE_TYPES[dtype]
    assert row.largest == torch.finfo(row.torch_dtype).max
    assert row is row_of(row.torch_dtype)


def test_no_other_module_lists_the_types() -> None:
    """A 16-bit type is one row: fp16, which no contract names, stands nowhere else in the package."""
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) in ONE_ROW_EACH:
            continue
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"float16", "half", "FP16"}, f"{path} names fp16; it can ask {dtypes.__name__}"


def _rectified(h: Tensor) -> Tensor:
    return h.relu()


@pytest.fixture
def with_rectified(monkeypatch: pytest.MonkeyPatch) -> str:
    """An activation that nothing but its row knows of."""
    row = ActivationRule(
        select=activations.rounded_relu,
        finish=activations.unchanged,
        plain=_rectified,
        nonnegative=True,
    )
    monkeypatch.setitem(activations.ACTIVATION_RULES, "rectified", row)
    return "rectified"


def test_an_activation_is_one_row(with_rectified: str) -> None:
    a, b = (torch.randint(-3, 4, size).bfloat16() for size in ((64, 16), (8, 16)))
    exact = a.float() @ b.float().T  # small integers: exact in any order
    expected = exact.relu().bfloat16()
    assert (exact < 0).any()
    assert torch.equal(reference.gemm(a, b, activation=with_rectified), expected)  # type: ignore[arg-type]
    assert torch.equal(library.dense_linear(a, b, None, with_rectified), expected)
    assert torch.equal(dense.library_gemm(a, b, None, with_rectified), expected)  # type: ignore[arg-type]
    packed = reference.sparsify24(exact.bfloat16(), with_rectified)  # type: ignore[arg-type]
    kept = reference.sparsify24(expected, Activation.NONE)
    assert torch.equal(packed.to_dense(), kept.to_dense())
    problem = Problem(Family(Op.GEMM, DType.BF16, with_rectified), 64, 8, 16)  # type: ignore[arg-type]
    assert verify.check(problem, Operands(a=a, b=b, out=expected)).ok
    assert not verify.check(problem, Operands(a=a, b=b, out=exact.bfloat16())).ok
    assert not verify.check(problem, Operands(a=a, b=b, out=expected.square())).ok


@pytest.mark.parametrize(
    "use",
    [
        lambda x, name: reference.gemm(x, x, activation=name),
        reference.sparsify24,
        lambda x, name: library.dense_linear(x, x, None, name),
        lambda x, name: dense.library_gemm(x, x, None, name),
        lambda x, name: srelu24.linear(x, x, activation=name),
        srelu24.sparsify24,
        lambda x, name: rule_of(name),
    ],
)
@pytest.mark.parametrize("unknown", ["gelu", "RELU2", None])
def test_an_unknown_activation_is_refused(use: Callable[[Tensor, object], object], unknown: object) -> None:
    with pytest.raises(Unsupported, match=r"activation is .*; it must be one of none, relu2"):
        use(torch.randn(8, 8).bfloat16(), unknown)


@pytest.mark.parametrize("activation", [a for a in Activation if rule_of(a).gradient])
def test_gradients_are_autograds(activation: Activation) -> None:
    rule = rule_of(activation)
    y = torch.randn(50, dtype=torch.float64, requires_grad=True)
    a = rule.plain(y)
    (expected,) = torch.autograd.grad(a.sum(), y)
    assert rule.gradient is not None
    got = rule.gradient(torch.ones(50, dtype=torch.float64), a.detach())
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("activation", list(Activation))
def test_signs_and_order_are_as_the_row_says(activation: Activation) -> None:
    rule = rule_of(activation)
    y = torch.linspace(-4, 4, 101)
    for dtype in (STORAGE_TYPES[each].torch_dtype for each in WIDE_TYPES):
        stored = rule.store(y, dtype)
        assert bool((stored >= 0).all()) == rule.nonnegative
        assert bool((stored.diff() >= 0).all())
        assert torch.equal(stored, rule.plain(y.to(dtype)))


def test_compiled_code_looks_the_rule_up() -> None:
    x, w = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    compiled = torch.compile(lambda x, w: srelu24.linear(x, w, activation="relu2"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, w), torch.nn.functional.linear(x, w).relu().square())
