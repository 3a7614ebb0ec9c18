"""Tuning the GEMMs of a training step, on a simulated GPU and through the real worker on the CPU."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import msgspec
import pytest

import cpu_session
from fake_gpu import H200, FakeGpu
from on_the_cpu import OnTheCpu
from rows import record
from srelu24.cli import live
from srelu24.db import health
from srelu24.db.database import Database
from srelu24.db.records import ChainStep, Trial
from srelu24.tuning import noise, tuner
from srelu24.tuning.events import Event, Failure, StageStarted
from srelu24.tuning.search import FEWEST
from srelu24.tuning.tuner import tune_ffn
from srelu24_gen import space
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, KernelConfig, KernelSpec, Problem

SHAPE = Shape(4096, 2048, 8192)
GEMMS = SHAPE.step_gemms(DType.BF16)
DEFAULTS = {p: space.default(p, H200) for p in GEMMS}
GOOD = {p: max(space.candidates(p, H200), key=functools.partial(noise.changes, d)) for p, d in DEFAULTS.items()}
"""As unlike the default as can be."""


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")


def planted(factor: float = 0.9) -> FakeGpu:
    return FakeGpu(lambda problem, config: factor if config == GOOD[problem] else 1.0)


def run(db: Database, gpu: FakeGpu, **options: object) -> tuner.TuneReport:
    """With time enough for all candidates, unless the options say otherwise."""
    options = {"budget_s": 1500.0} | options
    return tune_ffn(*SHAPE, DType.BF16, which=Pass.BACKWARD, db=db, runner=gpu, **options)  # type: ignore[arg-type]


def trials(db: Database) -> list[Trial]:
    return [trial for problem in GEMMS for trial in db.trials(problem, H200)]


def test_the_fastest_kernel_of_every_gemm_is_found_stored_and_found_again(db: Database) -> None:
    gpu = planted()
    report = run(db, gpu)
    assert {r.problem: r.kernel_config() for r in report.records} == GOOD
    assert report.speedup == pytest.approx(1 / 0.9, abs=0.02)
    assert not report.kept_default
    for problem, config in GOOD.items():
        found = db.find(problem, H200)
        assert found
        assert (found.how, found.config) == ("exact", config)
        evidence = found.record.evidence
        assert evidence.source_digest == gpu.key(KernelSpec(problem.family, config))
        assert evidence.pair_ms == report.pair_ms
        assert evidence.dense == {}, "nothing in training chooses by them"
        screened = {t.kernel_config() for t in db.trials(problem, H200) if t.stage == "screen"}
        assert screened == set(space.candidates(problem, H200))


def test_all_gemms_are_timed_one_after_another_and_the_trial_names_them(db: Database) -> None:
    gpu = planted()
    run(db, gpu)
    chains = [t for t in trials(db) if t.stage == "pair"]
    assert chains
    for trial in chains:
        problems, step = [trial.problem], trial.then
        while step is not None:
            problems.append(Problem(step.family, step.m, step.n, step.k))
            step = step.then
        assert tuple(problems) == GEMMS
        assert len(trial.source_digest.split("+")) == len(GEMMS)
    assert health.stale(chains, gpu.key) == []
    other = health.stale(chains, lambda spec: "new" if spec.family.transposed else gpu.key(spec))
    assert len(other) == len(chains), "the last of five has changed"


def test_a_trial_of_two_gemms_reads_as_it_was_written_before_there_were_more() -> None:
    text = b'{"family":{"op":"spgemm","dtype":"bf16"},"m":1,"n":8,"k":8,"config":{}}'
    step = msgspec.json.decode(text, type=ChainStep)
    assert step.then is None
    assert b"then" not in msgspec.json.encode(step)


def test_only_what_is_faster_replaces_a_default(db: Database) -> None:
    weights = GEMMS[3]
    gpu = FakeGpu(lambda problem, config: 0.8 if (problem, config) == (weights, GOOD[weights]) else 1.0)
    report = run(db, gpu)
    assert {r.problem: r.kernel_config() for r in report.records} == DEFAULTS | {weights: GOOD[weights]}
    assert report.speedup == pytest.approx(5 / 4.8, abs=0.01)


def test_the_defaults_stay_when_all_are_equal(db: Database) -> None:
    report = run(db, FakeGpu(sigma=0.03))
    assert report.kept_default
    assert report.speedup == 1.0


@pytest.mark.parametrize("stage", ["hangs", "does not compile", "wrong at full size"])
def test_what_fails_is_a_trial_with_its_reason_and_never_wins(db: Database, stage: str) -> None:
    gpu = planted()
    if stage == "hangs":
        gpu.broken = list(GOOD.values())
    elif stage == "does not compile":
        gpu.unbuildable = list(GOOD.values())
    else:
        gpu.wrong_at_full_size = [GOOD[GEMMS[2]]]
    events: list[Event] = []
    report = run(db, gpu, on_event=events.append)
    won = {r.problem: r.kernel_config() for r in report.records}
    failed = [t for t in trials(db) if t.outcome == "failed"]
    if stage == "wrong at full size":
        assert won[GEMMS[2]] != GOOD[GEMMS[2]]
        assert report.speedup > 1.01, "what is right and faster is kept"
        assert all("wrong result" in t.reason for t in failed)
    else:
        assert not set(won.items()) & set(GOOD.items())
        assert {(t.problem, t.kernel_config()) for t in failed} >= set(GOOD.items())
    assert failed
    assert len([e for e in events if isinstance(e, Failure)]) == len(failed)


def test_an_interrupted_search_goes_on(db: Database) -> None:
    first = planted()
    first.interrupt_after = 10
    with pytest.raises(KeyboardInterrupt):
        run(db, first)
    known = {(t.problem, t.kernel_config()) for t in trials(db)}
    assert len(known) > len(GEMMS)
    second = planted()
    report = run(db, second)
    again = second.timed(5) & known
    assert again <= set(DEFAULTS.items()), "only defaults, as the others' baseline"
    assert report.resumed == len(known - set(DEFAULTS.items()))
    assert {r.problem: r.kernel_config() for r in report.records} == GOOD


def test_little_time_still_finds_what_won_at_another_number_of_tokens(db: Database) -> None:
    run(db, planted())
    twice = SHAPE._replace(m=2 * SHAPE.m)
    wanted = dict(zip(twice.step_gemms(DType.BF16), GOOD.values(), strict=True))
    gpu = FakeGpu(lambda problem, config: 0.9 if config == wanted[problem] else 1.0, overhead=0.05, build_seconds=0.0)
    report = tune_ffn(*twice, DType.BF16, which=Pass.BACKWARD, db=db, runner=gpu, budget_s=6.0)
    assert {r.problem: r.kernel_config() for r in report.records} == wanted
    assert report.skipped > 0


def test_stages_are_told_by_gemm_and_the_live_view_takes_them(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    with live.live_view() as draw:
        run(db, planted(), on_event=lambda event: (events.append(event), draw(event))[0])
    stages = [(e.stage, e.what) for e in events if isinstance(e, StageStarted)]
    assert sorted(stages) == sorted(
        [(stage, str(p)) for stage in ("screen", "refine") for p in GEMMS] + [("pair", " + ".join(map(str, GEMMS)))]
    )
    shown = capsys.readouterr().err
    assert "spgemm_tokens_bf16_transposed" in shown
    assert "the default" in shown


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (Shape(4100, 2048, 8192), DType.BF16, "4100 tokens are not a multiple of 16"),
        (Shape(4096, 2056, 8192), DType.BF16, "a width of 2056 is not a multiple of 64"),
        (SHAPE, DType.E4M3, "e4m3"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_before_anything_runs(
    shape: Shape, dtype: DType, reason: str, db: Database
) -> None:
    gpu = FakeGpu()
    with pytest.raises(Unsupported, match=reason):
        tune_ffn(*shape, dtype, which=Pass.BACKWARD, db=db, runner=gpu)
    assert gpu.jobs == []


def test_the_whole_chain_on_a_cpu(db: Database) -> None:
    shape = Shape(80, 64, 128)
    gemms = shape.step_gemms(DType.BF16)

    def wrong(problem: Problem) -> KernelConfig:
        """Tried first, as the winner of another number of tokens; it forgets a row."""
        return dataclasses.replace(space.default(problem, H200), stages=cpu_session.WRONG_STAGES)

    for p in shape._replace(m=4096).step_gemms(DType.BF16):
        db.put(record(p.m, p.n, p.k, family=p.family, config=wrong(p).to_dict()))
    report = tune_ffn(*shape, DType.BF16, which=Pass.BACKWARD, db=db, runner=OnTheCpu(), budget_s=2.0)
    assert [r.problem for r in report.records] == list(gemms)
    assert report.tried >= len(gemms) * FEWEST
    assert {f.reason.partition(":")[0] for f in report.failures} == {"wrong result"}
    assert {f.what for f in report.failures} == set(map(str, gemms)), "each GEMM's wrong one was caught"
    assert all(t.outcome == "ok" for t in db.all_trials() if t.config["stages"] != cpu_session.WRONG_STAGES)
