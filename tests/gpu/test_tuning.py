"""Sparse or dense on a real GPU: every dense way, the modes of ffn, and the tuner from end to end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import srelu24
from srelu24.bench.peers import relative_error
from srelu24.db.choice import MARGIN, SPARSE
from srelu24.db.database import Database
from srelu24.measuring import timing, verify, verify_step, workload
from srelu24.measuring.workload_step import StepData
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime import dense, dispatch
from srelu24.training import kernels
from srelu24.tuning import recheck
from srelu24.tuning.many import Budget, tune_shapes
from srelu24.tuning.tuner import GpuRunner
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, Problem

SHAPES = [Shape(m, d, f) for m, d, f in ((1, 64, 256), (65, 136, 1864), (300, 512, 1024))]
PROBLEMS = [
    problem
    for shape in SHAPES
    for bias in (False, True)
    for problem in (*shape.gemms(DType.BF16, bias, bias), *shape.dense_gemms(DType.BF16, bias, bias))
]
STEP = Shape(2048, 512, 2048)
GEMMS = STEP.step_gemms(DType.BF16)
ADDED = dataclasses.replace(GEMMS[3], family=dataclasses.replace(GEMMS[3].family, accumulate=True, out=DType.FP32))
STEP_PROBLEMS = [*GEMMS, ADDED, *map(verify.small, Shape(16384, 4096, 14400).step_gemms(DType.BF16))]
PROBLEMS += STEP_PROBLEMS
Given = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""x, w1, w2, b1, b2"""


def operands(shape: Shape, device: torch.device, bias: bool) -> Given:
    data = workload.make_ffn(*shape, DType.BF16, 0.3, device)
    if not bias:
        return data.x, data.w1, data.w2, None, None
    b1, b2 = (torch.randn(n, device=device).bfloat16() for n in (shape.f, shape.d))
    return data.x, data.w1, data.w2, b1, b2


def expected(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
    """The dense FFN in float64."""
    h = torch.nn.functional.linear(x.double(), w1.double(), None if b1 is None else b1.double()).relu().square()
    return torch.nn.functional.linear(h, w2.double(), None if b2 is None else b2.double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", dense.WAYS)
def test_every_dense_way_is_the_dense_ffn(way: str, shape: Shape, bias: bool, device: torch.device) -> None:
    o = operands(shape, device, bias)
    assert relative_error(dense.ffn(way, *o), expected(*o)) < 1e-2


def test_modes_and_their_explanations(device: torch.device) -> None:
    shape = SHAPES[2]
    o = operands(shape, device, bias=True)
    runs = {mode: srelu24.explain(*o, mode=mode).runs for mode in dispatch.MODES}
    assert (runs["sparse"], runs["dense"]) == ("kernels", "dense")
    assert relative_error(srelu24.ffn(*o, mode="dense"), expected(*o)) < 1e-2
    pruned = relative_error(srelu24.ffn(*o, mode="sparse"), expected(*o))
    assert pruned > 1e-2, "pruning changes the result"
    auto = srelu24.ffn(*o)
    assert torch.equal(auto, srelu24.ffn(*o, mode="sparse" if runs["auto"] == "kernels" else "dense"))


@pytest.mark.parametrize("way", dense.WAYS)
def test_a_dense_way_is_captured_and_replayed(way: str, device: torch.device) -> None:
    x, w1, w2, _, _ = operands(SHAPES[2], device, bias=False)
    dense._kept_zeros.clear()
    captured = timing.capture(lambda: dense.ffn(way, x, w1, w2, None, None), device=device)
    assert captured.note is None
    x.copy_(x.roll(3, dims=0))
    captured.output.fill_(torch.nan)
    captured.call()
    assert relative_error(captured.output, expected(x, w1, w2, None, None)) < 1e-2


@pytest.mark.parametrize("mode", dispatch.MODES)
def test_torch_compile_traces_every_mode(mode: str, device: torch.device) -> None:
    o = operands(SHAPES[2], device, bias=False)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + srelu24.ffn(x, o[1], o[2], mode=mode), fullgraph=True)
    assert torch.equal(compiled(o[0]), o[0] + srelu24.ffn(*o, mode=mode))


@pytest.mark.parametrize("mode", dispatch.MODES)
def test_host_time_of_a_call(mode: str, device: torch.device) -> None:
    o = operands(SHAPES[0], device, bias=False)
    assert timing.host_us(functools.partial(srelu24.ffn, *o, mode=mode), device=device) < 150, (
        "generous: about 50 were measured"
    )


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Database], None]]:
    """Has the dispatcher ask another database."""
    with monkeypatch.context() as patch:

        def use(db: Database) -> None:
            dispatch.clear_cache()
            patch.setattr(dispatch, "_database", functools.cache(lambda: db))

        yield use
    dispatch.clear_cache()


def test_shapes_are_tuned_with_evidence_and_then_left_alone(device: torch.device, db: Database) -> None:
    shapes = [Shape(2048, 1024, 4096), Shape(512, 1024, 4096)]
    tuned = tune_shapes(shapes, DType.BF16, [GpuRunner(device)], Budget(5.0), db=db)
    assert [t.error for t in tuned] == ["", ""]
    for each in tuned:
        assert each.report
        assert each.report.failures == []
        assert each.report.tried > 10
        evidence = each.report.records[0].evidence
        assert set(evidence.dense) == set(dense.WAYS)
        assert evidence.pair_ms
        assert all(0.3 < d.ms / evidence.pair_ms < 3 for d in evidence.dense.values())
    again = tune_shapes(shapes, DType.BF16, [GpuRunner(device)], Budget(5.0), db=db)
    assert [t.report for t in again] == [None, None]


def test_tuning_twice_gives_winners_within_2_percent(device: torch.device, tmp_path: Path) -> None:
    shape = Shape(4096, 4096, 16384)
    times = []
    for number in range(2):
        store = Database.open(tmp_path / "none", tmp_path / f"{number}.sqlite")
        (tuned,) = tune_shapes([shape], DType.BF16, [GpuRunner(device)], Budget(15.0), db=store)
        assert tuned.report
        # Over the default of the same rounds: clocks drift between the two.
        times.append(tuned.report.pair_ms / tuned.report.pair_default_ms)
    assert max(times) / min(times) < 1.02


def test_the_choice_follows_the_records(
    device: torch.device, db: Database, answering: Callable[[Database], None]
) -> None:
    shape = Shape(512, 1024, 4096)
    (tuned,) = tune_shapes([shape], DType.BF16, [GpuRunner(device)], Budget(5.0), db=db)
    assert tuned.report
    answering(db)
    choice = dispatch.choose_ffn(shape, DType.BF16, False, False, dispatch.gpu_of(device))
    best = tuned.report.records[0].evidence.best_dense
    assert best
    assert choice.source == "measured"
    assert (choice.way == SPARSE) == (best[1].speedup >= MARGIN)
    o = operands(shape, device, bias=False)
    way = "sparse" if choice.way == SPARSE else "dense"
    assert torch.equal(srelu24.ffn(*o), srelu24.ffn(*o, mode=way))


# ------------------------------------------------------------------------------------------------------ training steps


@pytest.mark.parametrize("problem", STEP_PROBLEMS, ids=str)
def test_verification_accepts_the_training_kernels_and_nothing_else(problem: Problem, device: torch.device) -> None:
    o = StepData(Shape.of(problem), DType.BF16, 0.1, device).operands(problem.family)
    config = dispatch.choose(problem, dispatch.gpu_of(device)).config
    found = verify_step.verify(problem, config, o)
    assert found.ok, found.detail
    values = o.out.values if isinstance(o.out, Sparse24) else o.out
    values[-1] = values[-1] * 1.05 + 1.0
    assert not verify_step.check(problem, o).ok


def test_a_training_step_is_tuned_and_runs_what_was_found(
    device: torch.device, db: Database, answering: Callable[[Database], None]
) -> None:
    def gradients() -> list[Tensor]:
        layer = srelu24.Recipe(warmup_steps=0).layer("ffn", leaves[1])
        return list(torch.autograd.grad(srelu24.ffn(*leaves, recipe=layer), leaves, g))

    data = workload.make_ffn(*STEP, DType.BF16, 0.1, device)
    leaves = [t.requires_grad_() for t in (data.x, data.w1, data.w2)]
    g = torch.randn_like(data.x)
    answering(db)  # nothing is in it yet
    with_defaults = gradients()

    tune = functools.partial(tune_shapes, [STEP], DType.BF16, budget=Budget(10.0), passes=(Pass.BACKWARD,), db=db)
    (tuned,) = tune([GpuRunner(device)])
    assert tuned.error == ""
    assert tuned.report
    assert tuned.report.failures == []
    assert tuned.report.tried > 5 * len(GEMMS)
    assert [r.problem for r in tuned.report.records] == list(GEMMS)
    assert tuned.report.pair_ms < 1.1 * tuned.report.pair_default_ms
    assert [t.report for t in tune([GpuRunner(device)])] == [None], "it is tuned"

    answering(db)
    target = dispatch.gpu_of(device)
    for record in tuned.report.records:
        p = record.problem
        assert kernels.spec_for(p.family, (p.m, p.n, p.k), target).config == record.kernel_config()
        added = dataclasses.replace(p.family, accumulate=True, out=DType.FP32)
        if p.family.op is ADDED.family.op:
            assert kernels.spec_for(added, (p.m, p.n, p.k), target).config == record.kernel_config()
    for ours, theirs in zip(gradients(), with_defaults, strict=True):
        assert (ours.float() - theirs.float()).norm() < 2e-2 * theirs.float().norm()
    gpu = recheck.GpuRunner()
    try:
        assert {v.outcome for v in recheck.verify(tuned.report.records, gpu)} == {"right"}
    finally:
        gpu.close()
