"""Verification of the training kernels: right ones pass whatever their sums round to, each kind of fault is caught."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import played_kernels
from srelu24.measuring import verify, verify_step
from srelu24.measuring.verify import Check
from srelu24.measuring.workload_step import StepData, by_position
from srelu24.numerics.sparse24 import Sparse24
from srelu24.training import kernels
from srelu24.training.kernels import TrainingOperands
from srelu24.training.order import row_order, token_order
from srelu24_gen import space
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import TARGETS

SHAPE = Shape(80, 64, 320)
NAMES = ("hidden", "product", "gradient", "dw1", "dw2")
GEMMS = dict(zip(NAMES, SHAPE.step_gemms(DType.BF16), strict=True))
CPU = torch.device("cpu")


def variant(name: str, **options: object) -> Problem:
    problem = GEMMS[name]
    return dataclasses.replace(problem, family=dataclasses.replace(problem.family, **options))


VARIANTS = [
    *GEMMS.values(),
    variant("hidden", bias=True, dtype=DType.FP16),
    variant("product", bias=True),
    variant("gradient", dtype=DType.FP16),
    variant("dw1", accumulate=True, out=DType.FP32),
    variant("dw2", accumulate=True, out=DType.FP32),
    variant("dw2", accumulate=True, dtype=DType.FP16),
]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "run", played_kernels.run)


def operands(problem: Problem, density: float = 0.3, stride: int | None = None) -> TrainingOperands:
    assert Shape.of(problem) == SHAPE
    made = StepData(SHAPE, problem.family.dtype, density, "cpu").operands(problem.family)
    return dataclasses.replace(made, token_stride=stride)


def verified(problem: Problem, o: TrainingOperands) -> Check:
    return verify_step.verify(problem, KernelConfig(), o)


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("problem", VARIANTS, ids=str)
def test_right_kernels_pass_and_everything_was_written(problem: Problem, density: float, stride: int | None) -> None:
    o = operands(problem, density, stride)
    assert o.sizes == (problem.m, problem.n, problem.k)
    found = verified(problem, o)
    assert found.ok, found.detail
    assert found.max_error < 0.1
    if o.along_tokens is not None:
        assert f"{SHAPE.m // 2 * SHAPE.f} along tokens" in found.detail


def sums_in_fp64(problem: Problem, o: TrainingOperands) -> Tensor:
    """The product alone, in the order of the output."""
    if problem.family.op is Op.SPGEMM_TOKENS:
        assert not isinstance(o.a, Tensor | Sparse24)
        exact = o.a.to_dense().double().T @ o.b[token_order(SHAPE.m, None, CPU)].double()
        return exact.T if problem.family.transposed else exact
    assert isinstance(o.a, Sparse24)
    y = o.a.to_dense().double() @ o.b.double().T
    return torch.empty_like(y).index_copy_(0, row_order(SHAPE.m, None, CPU), y)


@pytest.mark.parametrize("name", ["product", "dw1", "dw2"])
def test_another_order_of_summing_passes_and_a_little_more_does_not(name: str) -> None:
    problem = GEMMS[name]
    o = operands(problem)
    assert isinstance(o.out, Tensor)
    exact = sums_in_fp64(problem, o)
    o.out.copy_(exact)
    assert verify_step.check(problem, o).ok
    o.out.copy_(exact * (1 + 2.0**-7))  # two units of bf16
    assert not verify_step.check(problem, o).ok


def test_sums_in_fp32_are_held_to_more_than_16_bits() -> None:
    problem = variant("dw1", accumulate=True, out=DType.FP32)
    o = operands(problem)
    assert isinstance(o.out, Tensor)
    before = o.out.clone()
    exact = sums_in_fp64(problem, o) + before
    o.out.copy_(exact)
    assert verify_step.check(problem, o, before).ok
    o.out.copy_(exact.bfloat16())
    assert "output" in verify_step.check(problem, o, before).detail
    o.out.copy_(exact - before)
    assert not verify_step.check(problem, o, before).ok, "it has to be added"


Fault = Callable[[TrainingOperands], None]


def _values(o: TrainingOperands) -> Tensor:
    return o.out.values if isinstance(o.out, Sparse24) else o.out


def one_value(o: TrainingOperands) -> None:
    values = _values(o)
    at = values.flatten().abs().argmax()
    values.view(-1)[at] *= 1.05


def two_rows_swapped(o: TrainingOperands) -> None:
    values = _values(o)
    values[[3, 4]] = values[[4, 3]]


def a_row_left_out(o: TrainingOperands) -> None:
    _values(o)[-1] = torch.nan


def a_sum_too_short(o: TrainingOperands) -> None:
    _values(o).mul_(1 - 16 / SHAPE.m)


def one_place(o: TrainingOperands) -> None:
    assert isinstance(o.out, Sparse24)
    o.out.metadata.view(-1)[0] ^= 0x8  # another pair of places in one group


def padding(o: TrainingOperands) -> None:
    assert isinstance(o.out, Sparse24)
    o.out.metadata[-1, -1, -1, -1] = 0


def a_count(o: TrainingOperands) -> None:
    assert o.counts is not None
    o.counts[5] += SHAPE.m


def one_value_along_tokens(o: TrainingOperands) -> None:
    assert o.along_tokens is not None
    at = o.along_tokens.values.flatten().abs().argmax()
    o.along_tokens.values.view(-1)[at] = 0


def groups_of_other_rows(o: TrainingOperands) -> None:
    """Of rows as they lie, not by position."""
    assert isinstance(o.out, Sparse24)
    assert o.along_tokens is not None
    other = played_kernels.of_positions(o.out.to_dense())
    o.along_tokens.values.copy_(other.values)
    o.along_tokens.metadata.copy_(other.metadata)


def the_smallest_is_kept(o: TrainingOperands) -> None:
    """In one group; its place, that is: whatever value stands there."""
    assert isinstance(o.out, Sparse24)
    assert o.along_tokens is not None
    dense = by_position(o.out.to_dense())
    groups = dense.view(-1, 4, dense.shape[1]).clone()
    group, feature = (int(i) for i in (groups != 0).all(dim=1).nonzero()[0])
    groups[group, groups[group, :, feature].abs().argmin(), feature] = 99.0
    o.along_tokens.metadata.copy_(played_kernels.of_positions(groups.view_as(dense)).metadata)


FAULTS: dict[str, list[tuple[Fault, str]]] = {
    "hidden": [
        (one_value, "kept value"),
        (two_rows_swapped, "kept value"),
        (a_row_left_out, "kept value"),
        (one_place, "metadata nibble|2:4 selection|kept value"),
        (padding, "metadata padding"),
        (a_count, "non-zero count"),
        (one_value_along_tokens, "kept value along tokens"),
        (groups_of_other_rows, "selection along tokens"),
        (the_smallest_is_kept, "selection along tokens"),
    ],
    "gradient": [
        (one_value, "kept value"),
        (two_rows_swapped, "kept value"),
        (a_row_left_out, "kept value"),
        (one_value_along_tokens, "kept value along tokens"),
        (groups_of_other_rows, "selection along tokens"),
        (the_smallest_is_kept, "selection along tokens"),
    ],
    "product": [(one_value, "output"), (two_rows_swapped, "output"), (a_row_left_out, "output")],
    "dw1": [(one_value, "output"), (two_rows_swapped, "output"), (a_sum_too_short, "output")],
    "dw2": [(one_value, "output"), (two_rows_swapped, "output"), (a_sum_too_short, "output")],
}


@pytest.mark.parametrize(
    ("name", "fault", "what"),
    [(name, fault, what) for name, faults in FAULTS.items() for fault, what in faults],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_numbers_are_caught_and_named(
    name: str, fault: Fault, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(spec: KernelSpec, o: TrainingOperands) -> None:
        played_kernels.run(spec, o)
        fault(o)

    monkeypatch.setattr(kernels, "run", faulty)
    found = verified(GEMMS[name], operands(GEMMS[name]))
    assert not found.ok
    assert re.search(what, found.detail)


@pytest.mark.parametrize("problem", VARIANTS, ids=str)
def test_a_kernel_that_does_nothing_is_wrong(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    o = operands(problem)
    assert verified(problem, o).ok  # its outputs are right now, and have to be written again
    monkeypatch.setattr(kernels, "run", lambda spec, o: None)
    assert not verified(problem, o).ok


def test_a_gradient_where_s_is_zero_has_to_be_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GEMMS["gradient"]
    o = operands(problem, density=0.1)
    assert o.saved is not None
    o.b[0] = torch.inf  # dS of feature 0 is not finite, and dY1 is zero all the same where S is
    assert verified(problem, o).ok
    zero = (o.saved.values == 0).nonzero()[0]
    o.out.values[tuple(zero)] = 0.5  # type: ignore[union-attr]
    assert not verify_step.check(problem, o).ok


def test_chunks_do_not_change_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hidden", "gradient"):
        o = operands(GEMMS[name])
        whole = verified(GEMMS[name], o)
        for module in (verify, verify_step):
            monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64 * SHAPE.f)
        assert verify_step.check(GEMMS[name], o) == whole
        one_value_along_tokens(o)
        assert not verify_step.check(GEMMS[name], o).ok
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "run", played_kernels.run)


@pytest.mark.parametrize("shape", [Shape(512, 64, 2240), Shape(16, 128, 64), Shape(1040, 64, 192)], ids=str)
def test_every_size_can_be_made_and_verified(shape: Shape) -> None:
    for problem in shape.step_gemms(DType.BF16):
        data = StepData(shape, DType.BF16, 0.3, "cpu")
        assert verified(problem, data.operands(problem.family)).ok


def test_every_gemm_of_a_step_reads_the_same_layer() -> None:
    data = StepData(SHAPE, DType.BF16, 0.3, "cpu")
    o = {name: data.operands(problem.family) for name, problem in GEMMS.items()}
    assert o["hidden"].a is o["dw1"].b
    assert o["gradient"].a is o["dw2"].b
    assert torch.equal(o["gradient"].b, o["product"].b.T)
    assert o["product"].a is o["gradient"].saved
    s = played_kernels.pruned_hidden(o["hidden"].a, o["hidden"].b, None, None)
    assert (s[0].values != o["product"].a.values).float().mean() < 0.01, "but for rounding"
    _, along = played_kernels.hidden_gradient(o["gradient"].a, o["gradient"].b, o["product"].a, None)
    dy1 = along.to_dense()
    assert (dy1 - o["dw1"].a.to_dense()).norm() < 0.05 * dy1.norm(), "but for rounding, and ties that it decides"
    assert torch.equal(played_kernels.along_tokens(o["product"].a).values, o["dw2"].a.values)
    density = (o["product"].a.to_dense() != 0).float().mean()
    assert 0.15 < density < 0.3


def test_small_problems_keep_what_decides_a_kernels_paths() -> None:
    for problem in Shape(16384, 4096, 21504).step_gemms(DType.BF16):
        small = verify.small(problem)
        assert small.family == problem.family
        assert small.tokens % 16 == 0
        assert all(width % 64 == 0 for width in small.widths)
        assert (small.n - problem.n) % 256 == (small.k - problem.k) % 256 == 0
        for tile_m in {m for m, _ in space.tiles(TARGETS["h200"]) if m > 64}:
            assert small.m % tile_m, "rows end inside a tile"
        assert small.flops < problem.flops / 50
    tiny = Problem(Family(Op.SPGEMM_TOKENS, DType.BF16), 64, 128, 16)
    assert verify.small(tiny) == tiny
