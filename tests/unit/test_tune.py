"""The tuner on simulated GPUs, its decisions under noise, and the worker process with children that hang and crash."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srelu24 import measure, noise, tune, verify, worker
from srelu24.db import Database, Trial
from srelu24.noise import choose_pair, speedup
from srelu24.tune import tune_ffn
from srelu24.tune_events import Advanced, Event, Failure, Finished, StageStarted
from srelu24.worker import (
    Candidate,
    Done,
    Failed,
    Job,
    Outcome,
    Progressed,
    Reply,
    Started,
    Step,
    Timed,
    Verified,
    Worker,
)
from srelu24_gen import space
from srelu24_gen.errors import CompileError, LaunchError, Srelu24Error, Unsupported
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import TARGETS

H200 = TARGETS["h200"]
M, D, F = 4096, 2048, 8192
GEMM1 = Problem(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), M, F, D)
GEMM2 = Problem(Family(Op.SPGEMM, DType.BF16), M, D, F)
DEFAULTS = (space.default(GEMM1, H200), space.default(GEMM2, H200))
OTHERS = tuple([c for c in space.candidates(p, H200) if c != d] for p, d in zip((GEMM1, GEMM2), DEFAULTS, strict=True))
NEXT = min(OTHERS[0], key=lambda c: (c.raster_group != DEFAULTS[0].raster_group, noise.changes(c, DEFAULTS[0])))
"""The first to be tried after the default."""
GOOD = tuple(max(o, key=functools.partial(noise.changes, d)) for o, d in zip(OTHERS, DEFAULTS, strict=True))
"""As unlike the default as can be: another binary, and another raster."""


class FakeGpu:
    """A :class:`srelu24.search.Runner` that makes times up; every job and build passes its simulated seconds."""

    def __init__(
        self,
        cost: Callable[[Problem, KernelConfig], float] = lambda problem, config: 1.0,
        *,
        pair_cost: Callable[[tuple[Step, ...]], float] | None = None,
        sigma: float = 0.01,
        drift: float = 0.1,
        broken: Sequence[KernelConfig] = (),
        build_seconds: float = 0.01,
        overhead: float = 0.5,
        version: str = "v1",
        seed: int = 0,
    ) -> None:
        self.target = H200
        self.cost, self.pair_cost, self.sigma, self.drift = cost, pair_cost, sigma, drift
        self.broken, self.build_seconds, self.overhead, self.version = broken, build_seconds, overhead, version
        self.unbuildable: Sequence[KernelConfig] = ()
        self.interrupt_after: int | None = None
        self.random = random.Random(seed)
        self.clock = 0.0
        self.jobs: list[Job] = []
        self.closed = False

    def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
        for spec in specs:
            self.clock += self.build_seconds
            yield spec, CompileError("no such register") if spec.config in self.unbuildable else self.key(spec)

    def key(self, spec: KernelSpec) -> str:
        return f"{self.version}-{spec.digest}"

    def run(self, job: Job) -> Iterator[Outcome]:
        if self.interrupt_after is not None and len(self.jobs) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.jobs.append(job)
        self.clock += job.seconds + self.overhead
        alive = []
        for candidate in job.candidates:
            if any(step.config in self.broken for step in candidate.steps):
                yield Failed(candidate.name, "no answer within 30 s; the kernel hangs")
            else:
                alive.append(candidate)
        rounds = max(job.min_rounds, int(job.seconds / (0.025 * max(len(alive), 1))))
        samples: dict[str, list[float]] = {c.name: [] for c in alive}
        clock = 1.0
        for _ in range(rounds):
            clock *= 1 + self.random.gauss(0, self.drift)  # all candidates of a round share the GPU's mood
            for candidate in alive:
                ms = sum(self.cost(step.problem, step.config) for step in candidate.steps)
                if self.pair_cost and len(candidate.steps) == 2:
                    ms = self.pair_cost(candidate.steps)
                samples[candidate.name].append(ms * clock * (1 + self.random.gauss(0, self.sigma)))
        yield Progressed(1.0)
        for name, taken in samples.items():
            yield Timed(name, sorted(taken)[len(taken) // 2], taken, sm_mhz=1500.0, watts=690.0)

    def versions(self) -> dict[str, str]:
        return {"driver": "580.1"}

    def now(self) -> float:
        return self.clock

    def close(self) -> None:
        self.closed = True

    def timed(self, stage_rounds: int) -> set[tuple[Problem, KernelConfig]]:
        """What ran in jobs of so many rounds at least: 5 is a screening."""
        return {
            (step.problem, step.config)
            for job in self.jobs
            if job.min_rounds == stage_rounds
            for candidate in job.candidates
            for step in candidate.steps
        }


def better(*configs: KernelConfig, factor: float = 0.95) -> Callable[[Problem, KernelConfig], float]:
    return lambda problem, config: factor if config in configs else 1.0


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")


def run(db: Database, gpu: FakeGpu, **options: object) -> tune.TuneReport:
    """Tune with time enough for all candidates, unless told otherwise."""
    return tune_ffn(M, D, F, DType.BF16, db=db, runner=gpu, **({"budget_s": 600.0} | options))  # type: ignore[arg-type]


def trials(db: Database) -> list[Trial]:
    return [*db.trials(GEMM1, H200), *db.trials(GEMM2, H200)]


# --- the search ---


@pytest.mark.parametrize("seed", range(3))
def test_the_fastest_pair_is_found_stored_and_found_again(db: Database, seed: int) -> None:
    gpu = FakeGpu(better(*GOOD), seed=seed)
    report = run(db, gpu)
    assert [r.kernel_config() for r in report.records] == list(GOOD)
    assert report.speedup == pytest.approx(1 / 0.95, abs=0.01)
    assert not report.kept_default
    assert report.skipped == 0
    assert gpu.closed
    for problem, config in zip((GEMM1, GEMM2), GOOD, strict=True):
        found = db.find(problem, H200)
        assert found
        assert (found.how, found.config, found.record.density) == ("exact", config, 0.1)
        evidence = found.record.evidence
        assert evidence.default_ms / evidence.ms == pytest.approx(1 / 0.95, rel=0.05)
        assert evidence.source_digest == gpu.key(KernelSpec(problem.family, config))
        assert evidence.versions == {"driver": "580.1"}
        assert (evidence.sm_mhz, evidence.watts, evidence.dense_ms) == (1500.0, 690.0, None)
        assert evidence.pair_ms == report.pair_ms
        assert evidence.samples >= 8


def test_every_candidate_is_tried_and_every_trial_is_kept(db: Database) -> None:
    gpu = FakeGpu()
    report = run(db, gpu)
    for problem, default, others in zip((GEMM1, GEMM2), DEFAULTS, OTHERS, strict=True):
        screened = {c for p, c in gpu.timed(5) if p == problem}
        assert screened == {default, *others}
        stored = {t.kernel_config() for t in db.trials(problem, H200) if t.stage == "screen" and t.outcome == "ok"}
        assert stored == screened
    pairs = [t for t in trials(db) if t.stage == "pair"]
    assert len(pairs) > 4
    assert all(t.then and t.then.family == GEMM2.family and t.family == GEMM1.family for t in pairs)
    assert report.tried == len(trials(db))


def test_every_binary_is_screened_before_any_variant_and_those_like_the_default_first(db: Database) -> None:
    gpu = FakeGpu()
    run(db, gpu)
    for problem, default, others in zip((GEMM1, GEMM2), DEFAULTS, OTHERS, strict=True):
        jobs = [[c.steps[0] for c in job.candidates] for job in gpu.jobs if job.min_rounds == 5]
        order = [step.config for steps in jobs for step in steps[1:] if step.problem == problem]
        binaries = {c.compiled() for c in others} - {default.compiled()}
        first = order[: len(binaries)]
        assert {c.compiled() for c in first} == binaries
        changed = [noise.changes(c, default) for c in first]
        assert changed == sorted(changed)


def test_the_default_stays_when_all_are_equal(tmp_path: Path) -> None:
    kept = 0
    for seed in range(10):
        db = Database.open(tmp_path / "none", tmp_path / f"{seed}.sqlite")
        report = run(db, FakeGpu(sigma=0.03, seed=seed))
        assert report.speedup < 1.01
        if report.kept_default:
            kept += 1
            assert report.speedup == 1.0
            assert [r.kernel_config() for r in report.records] == list(DEFAULTS)
    assert kept >= 9  # one search in a hundred may err


def test_a_slower_world_keeps_the_default(db: Database) -> None:
    report = run(db, FakeGpu(better(*DEFAULTS, factor=0.9)))
    assert report.kept_default


def test_the_pair_decides_not_the_parts(db: Database) -> None:
    second = OTHERS[1][0]
    alone = {GOOD[0]: 0.90, GOOD[1]: 0.90, second: 0.92}
    gpu = FakeGpu(
        lambda problem, config: alone.get(config, 1.0),
        # Chained, the best second GEMM pays for what the first left of the power budget.
        pair_cost=lambda steps: 1.7 if (steps[0].config, steps[1].config) == (GOOD[0], second) else 2.0,
    )
    report = run(db, gpu)
    assert [r.kernel_config() for r in report.records] == [GOOD[0], second]
    assert report.speedup == pytest.approx(2 / 1.7, rel=0.02)


@pytest.mark.parametrize("stage", ["verify", "compile"])
def test_failures_are_trials_with_their_reason_and_never_win(db: Database, stage: str) -> None:
    gpu = FakeGpu(better(*GOOD, OTHERS[1][0], factor=0.8), broken=GOOD if stage == "verify" else ())
    gpu.unbuildable = GOOD if stage == "compile" else ()
    events: list[Event] = []
    report = run(db, gpu, on_event=events.append)
    reason = "the kernel hangs" if stage == "verify" else "no such register"
    failed = [t for t in trials(db) if t.outcome == "failed"]
    assert {(t.problem, t.kernel_config()) for t in failed} >= set(zip((GEMM1, GEMM2), GOOD, strict=True))
    assert all(reason in t.reason and t.ms is None for t in failed)
    assert len(report.failures) == len(failed) == len([e for e in events if isinstance(e, Failure)])
    assert not {GOOD[0], GOOD[1]} & {r.kernel_config() for r in report.records}


@pytest.mark.parametrize("stage", ["verify", "compile"])
def test_a_default_that_fails_stops_the_search_with_its_reason(db: Database, stage: str) -> None:
    gpu = FakeGpu(broken=DEFAULTS[:1] if stage == "verify" else ())
    gpu.unbuildable = DEFAULTS[:1] if stage == "compile" else ()
    error, match = (LaunchError, "default.*hangs") if stage == "verify" else (CompileError, "no such register")
    with pytest.raises(error, match=match):
        run(db, gpu)
    assert gpu.closed
    assert [t.outcome for t in trials(db) if t.kernel_config() == DEFAULTS[0]][-1] == "failed"
    assert db.records() == []


def test_an_interrupt_keeps_the_trials_and_the_next_run_takes_them_over(db: Database) -> None:
    first = FakeGpu(better(*GOOD), broken=[NEXT])
    first.interrupt_after = 4
    with pytest.raises(KeyboardInterrupt):
        run(db, first)
    assert first.closed
    known = {(t.problem, t.kernel_config()) for t in trials(db)}
    everything = {(p, c) for p in (GEMM1, GEMM2) for c in space.candidates(p, H200)}
    assert 2 < len(known) < len(everything)
    kin = {(GEMM1, c) for c in OTHERS[0] if c != NEXT and c.compiled() == NEXT.compiled()}
    assert kin

    second = FakeGpu(better(*GOOD), seed=1)
    report = run(db, second)
    again = second.timed(5)
    assert again & known == set(zip((GEMM1, GEMM2), DEFAULTS, strict=True)), (
        "only the defaults, as the others' baseline"
    )
    assert everything - (again | known) == kin
    assert report.resumed == len(known) - 2
    assert [r.kernel_config() for r in report.records] == list(GOOD)
    assert [f.reason for f in report.failures] == ["no answer within 30 s; the kernel hangs"]
    assert {f.reason for f in report.pruned} == {"its binary failed with another raster group"}
    assert len(report.pruned) == len(kin)


@pytest.mark.parametrize("change", ["version", "density", "resume"])
def test_nothing_is_taken_over_from_another_binary_or_density_or_against_the_users_will(
    db: Database, change: str
) -> None:
    run(db, FakeGpu())
    gpu = FakeGpu(version="v2" if change == "version" else "v1")
    report = run(db, gpu, density=0.5 if change == "density" else 0.1, resume=change != "resume")
    assert report.resumed == 0
    assert len(gpu.timed(5)) == len(OTHERS[0]) + len(OTHERS[1]) + 2


def test_the_budget_is_kept_and_what_is_left_out_is_counted(db: Database) -> None:
    gpu = FakeGpu(overhead=4.0)
    report = run(db, gpu, budget_s=60.0)
    assert report.skipped > 0
    assert report.seconds < 60 * 1.5
    assert len(report.records) == 2
    relaxed = FakeGpu()
    assert 30 < run(db, relaxed, budget_s=60.0, resume=False).seconds < 60 * 1.2


def test_a_slow_compiler_still_leads_to_an_answer(db: Database) -> None:
    report = run(db, FakeGpu(build_seconds=40.0), budget_s=10.0)
    assert report.kept_default
    assert report.skipped == len(OTHERS[0]) + len(OTHERS[1])


@pytest.mark.parametrize("like", [DEFAULTS[0], GOOD[0]], ids=["the default's binary", "another binary"])
def test_the_nearest_record_is_tried_first(db: Database, like: KernelConfig) -> None:
    near = dataclasses.replace(like, raster_group=3)  # not among the candidates
    report = tune_ffn(M, D, F, DType.BF16, db=db, runner=FakeGpu())
    record = msgspec.structs.replace(report.records[0], m=M // 2, config=near.to_dict())
    fresh = Database.open(db.shipped_folder, db.user_file.with_name("fresh.sqlite"))
    fresh.put(record)
    gpu = FakeGpu(better(near))
    assert run(fresh, gpu).records[0].kernel_config() == near
    first = next(job for job in gpu.jobs if job.candidates[0].steps[0].problem == GEMM1)
    assert first.candidates[1].steps[0].config == near


def test_dense_kernels_are_tuned_and_timed_beside_the_sparse_ones(db: Database) -> None:
    gpu = FakeGpu(lambda problem, config: 1.3 if problem.family.op is Op.GEMM else 1.0)
    report = run(db, gpu, dense=True)
    assert [r.family.op for r in report.records] == [Op.GEMM_RELU2_24, Op.SPGEMM, Op.GEMM, Op.GEMM]
    for record in report.records[:2]:
        assert record.evidence.dense_ms
        assert record.evidence.dense_ms / record.evidence.ms == pytest.approx(1.3, rel=0.1)
        assert record.evidence.pair_dense_ms
        assert record.evidence.pair_dense_ms / report.pair_ms == pytest.approx(1.3, rel=0.1)
    assert report.seconds < 600 * 1.2


def test_bias_is_part_of_the_problem(db: Database) -> None:
    report = run(db, FakeGpu(), bias=True)
    assert [r.family.name for r in report.records] == ["gemm_relu2_24_bf16_bias", "spgemm_bf16_bias"]


def test_what_cannot_be_tuned_is_refused_before_anything_runs(db: Database) -> None:
    for m, d, f, match in ((0, D, F, "at least one token"), (M, 12, F, "multiple of 8")):
        gpu = FakeGpu()
        with pytest.raises(Unsupported, match=match):
            tune_ffn(m, d, f, DType.BF16, db=db, runner=gpu)
        assert gpu.jobs == []
    with pytest.raises(Unsupported, match="CUDA GPU"):
        tune_ffn(M, D, F, DType.BF16, db=db, device="cpu")


def test_events_tell_the_whole_story_and_the_live_view_takes_them(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    gpu = FakeGpu(better(*GOOD), broken=[NEXT])
    with tune.live_view() as draw:
        report = run(db, gpu, on_event=lambda event: (events.append(event), draw(event))[0])
    stages = [(e.stage, e.what) for e in events if isinstance(e, StageStarted)]
    both = f"{GEMM1} + {GEMM2}"
    assert sorted(stages) == sorted(
        [(s, str(p)) for s in ("screen", "refine") for p in (GEMM1, GEMM2)] + [("pair", both)]
    )
    for stage, what in stages:
        done = [e.done for e in events if isinstance(e, Advanced) and (e.stage, e.what) == (stage, what)]
        assert done == sorted(done)
        total = next(e.total for e in events if isinstance(e, StageStarted) and (e.stage, e.what) == (stage, what))
        assert done[-1] == total
    assert events[-1] == Finished(report)
    shown = capsys.readouterr().err
    assert "failed: " in shown
    assert "1.05" in shown
    assert msgspec.json.decode(msgspec.json.encode(report))["speedup"] == report.speedup


# --- is it really faster? ---


def paired(rng: random.Random, rounds: int, factors: Sequence[float], sigma: float = 0.02) -> list[list[float]]:
    mood = [1 + rng.gauss(0, 0.2) ** 2 for _ in range(rounds)]
    return [[f * x * (1 + rng.gauss(0, sigma)) for x in mood] for f in factors]


def test_equal_candidates_are_hardly_ever_told_apart() -> None:
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        times = paired(rng, 30, [1.0] * 9)
        pairs = [(DEFAULTS[0], c) for c in [DEFAULTS[1], *OTHERS[1][:8]]]
        wrong += choose_pair(dict(zip(pairs, times, strict=True)), pairs[0])[0] != pairs[0]
    assert wrong <= 6  # 1 % of 300 is 3


def test_a_clear_gain_is_seen_in_spite_of_drift() -> None:
    rng = random.Random(0)
    seen = 0
    for _ in range(50):
        default, good = paired(rng, 40, [1.0, 0.97])
        found = speedup(default, good)
        seen += found.low > 1
        assert found.low <= found.median <= found.high
        assert found.median == pytest.approx(1 / 0.97, abs=0.015)
    assert seen >= 48


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median_and_turns_around(samples: list[float]) -> None:
    ones = [1.0] * len(samples)
    there, back = speedup(samples, ones), speedup(ones, samples)
    assert there.low <= there.median <= there.high
    if there.low > 0:
        assert back.high == pytest.approx(1 / there.low)
    if len(samples) < 5:
        assert there.low == 0, "so few rounds prove nothing"


def test_a_tiny_gain_is_not_worth_a_change() -> None:
    pair = (DEFAULTS[0], OTHERS[1][0])
    tiny = 1 / (1 + (noise.MIN_GAIN - 1) / 2)
    assert choose_pair({DEFAULTS: [1.0] * 40, pair: [tiny] * 40}, DEFAULTS)[0] == DEFAULTS


def test_of_equals_the_one_nearest_to_the_default_is_kept() -> None:
    rng = random.Random(1)
    near = (DEFAULTS[0], dataclasses.replace(DEFAULTS[1], raster_group=4))
    far = (dataclasses.replace(DEFAULTS[0], raster_group=4, stages=3), near[1])
    default, a, b, c = paired(rng, 40, [1.0, 0.94, 0.9399, 0.8])
    assert choose_pair({DEFAULTS: default, far: b, near: a}, DEFAULTS)[0] == near
    assert choose_pair({DEFAULTS: default, far: c, near: a}, DEFAULTS)[0] == far


# --- the worker process: the parent's end ---

CHILD = """
import json, os, signal, sys, time
send = lambda **fields: print(json.dumps(fields), flush=True)
send(type="Ready")
for line in sys.stdin:
    names = [c["name"] for c in json.loads(line)["candidates"]]
    alive = []
    for name in names:
        send(type="Started", name=name)
        if name.startswith("hangs"): time.sleep(60)
        if name.startswith("crashes"): print("CUDA error: illegal access", file=sys.stderr, flush=True); os.abort()
        if name.startswith("babbles"): print("warning: hello", flush=True)
        if name.startswith("breaks"):
            send(type="Failed", name=name, reason="illegal access", broken=True); sys.exit(1)
        if name.startswith("wrong"): send(type="Failed", name=name, reason="wrong result"); continue
        send(type="Verified", name=name); alive.append(name)
    for name in alive:
        if name.startswith("races"): time.sleep(60)
        if name.startswith("meets") and len(alive) > 1: os._exit(7)
    send(type="Progressed", fraction=1.0)
    for name in alive: send(type="Timed", name=name, ms=1.0, samples=[float(os.getpid())])
    send(type="Done")
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Worker]:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    with Worker("cpu", step_seconds=0.4, start_seconds=20, command=(sys.executable, "-S", str(script))) as found:
        yield found


def job(*names: str) -> Job:
    return Job(tuple(Candidate(name, (Step(GEMM2, DEFAULTS[1]),)) for name in names), 0.1, 1.0, 5)


def outcomes(child: Worker, *names: str) -> tuple[list[str], dict[str, str]]:
    """Who was timed, and why the others were not; each name must have exactly one end."""
    found = list(child.run(job(*names)))
    timed = [o.name for o in found if isinstance(o, Timed)]
    failed = {o.name: o.reason for o in found if isinstance(o, Failed)}
    ends = [o.name for o in found if isinstance(o, Timed | Failed)]
    assert sorted(ends) == sorted(names)
    return timed, failed


def test_candidates_that_fail_are_left_out_and_the_others_are_timed(children: Worker) -> None:
    timed, failed = outcomes(children, "a", "hangs 1", "b", "crashes", "wrong", "babbles", "breaks", "c", "hangs 2")
    assert timed == ["a", "b", "c"]
    assert "no answer within 0.4 s" in failed["hangs 1"]
    assert failed["hangs 2"] == failed["hangs 1"]
    assert failed["crashes"] == f"the worker ended by signal {signal.SIGABRT}: CUDA error: illegal access"
    assert failed["wrong"] == "wrong result"
    assert failed["breaks"] == "illegal access"
    assert "warning: hello" in failed["babbles"]


def test_one_child_serves_many_jobs(children: Worker) -> None:
    pids = {o.samples[0] for _ in range(3) for o in children.run(job("a")) if isinstance(o, Timed)}
    assert len(pids) == 1


def test_a_loss_while_timing_is_traced_by_timing_alone(children: Worker) -> None:
    timed, failed = outcomes(children, "a", "races", "b")
    assert timed == ["a", "b"]
    assert "hangs" in failed["races"]


def test_those_that_only_fail_together_are_given_up(children: Worker) -> None:
    timed, failed = outcomes(children, "meets", "a", "wrong")
    assert timed == []
    assert failed["meets"] == failed["a"] == "the worker ended with status 7"
    assert outcomes(children, "b") == (["b"], {})


def test_a_child_killed_between_jobs_is_replaced(children: Worker) -> None:
    (first,) = [o for o in children.run(job("a")) if isinstance(o, Timed)]
    os.kill(int(first.samples[0]), signal.SIGKILL)
    time.sleep(0.1)
    assert outcomes(children, "a") == (["a"], {})


def test_an_abandoned_job_does_not_answer_the_next_one(children: Worker) -> None:
    for outcome in children.run(job("wrong", "a")):
        assert isinstance(outcome, Failed)
        break
    assert outcomes(children, "b") == (["b"], {})


def test_a_child_that_cannot_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit('no CUDA driver')")
    child = Worker("cpu", command=(sys.executable, str(script)))
    with pytest.raises(LaunchError, match=r"did not start: .*no CUDA driver"):
        list(child.run(job("a")))


def test_the_child_is_gone_after_close(children: Worker) -> None:
    (timed,) = [o for o in children.run(job("a")) if isinstance(o, Timed)]
    children.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(timed.samples[0]), 0)


# --- the worker process: the child's end ---


def test_the_child_verifies_then_times_and_chains_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    small1, small2 = (dataclasses.replace(GEMM1, m=64, n=256, k=64), dataclasses.replace(GEMM2, m=64, n=64, k=256))
    wrong = dataclasses.replace(DEFAULTS[1], stages=2)
    verified: list[tuple[Problem, KernelConfig]] = []
    launched: list[tuple[Op, object, object]] = []

    def fake_verify(
        problem: Problem, config: KernelConfig, operands: worker.launch.Operands, arch: str
    ) -> verify.Check:
        verified.append((problem, config))
        return verify.Check(config != wrong, 0.5, "the first at row 3")

    monkeypatch.setattr(worker, "verify", fake_verify)
    monkeypatch.setattr(worker.launch, "run", lambda spec, o: launched.append((spec.family.op, o.a, o.out)))

    def fake_interleave(
        calls: dict[str, Callable[[], None]], *, on_progress: Callable[[measure.Progress], None], **_: object
    ) -> dict[str, measure.Timing]:
        launched.clear()
        for call in calls.values():
            call()
        on_progress(measure.Progress(1, 1.0))
        return {name: measure.Timing(2.0, [2.0, 2.0]) for name in calls}

    monkeypatch.setattr(worker, "interleave", fake_interleave)
    replies: list[Reply] = []
    session = worker.Session("cpu", replies.append)
    chain = (Step(small1, DEFAULTS[0]), Step(small2, DEFAULTS[1]))
    for _ in range(2):
        session.run(Job((Candidate("chain", chain), Candidate("bad", (Step(small2, wrong),))), 0.5, 1.0, 5))
    half = len(replies) // 2
    assert (
        replies[:half]
        == replies[half:]
        == [
            Started("chain"),
            Verified("chain"),
            Started("bad"),
            Failed("bad", "wrong result: the first at row 3"),
            Progressed(1.0),
            Timed("chain", 2.0, [2.0, 2.0]),
            Done(),
        ]
    )
    assert verified.count((small1, DEFAULTS[0])) == 1, "once is enough"
    (first, _, out1), (second, a2, _) = launched
    assert (first, second) == (Op.GEMM_RELU2_24, Op.SPGEMM)
    assert a2 is out1


def test_the_real_child_answers_survives_an_error_and_dies_with_its_parent() -> None:
    command = [*worker.COMMAND, "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=worker.child_environment(), **pipes) as child:
        assert child.stdin
        assert child.stdout
        assert msgspec.json.decode(child.stdout.readline(), type=Reply) == worker.Ready()
        for _ in range(2):
            impossible = msgspec.structs.replace(job("a"), density=2.0)  # no data has this density
            child.stdin.write(msgspec.json.encode(impossible) + b"\n")
            child.stdin.flush()
            replies = [msgspec.json.decode(child.stdout.readline(), type=Reply) for _ in range(3)]
            assert isinstance(replies[1], Failed)
            assert "density" in replies[1].reason
            assert replies[2] == Done()
        child.stdin.close()
        assert child.wait(timeout=10) == 0


# --- the real runner, as far as it goes without a GPU ---


def test_builds_come_as_they_are_done_and_stop_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [KernelSpec(GEMM2.family, c) for c in OTHERS[1][:5]]
    attempted: list[KernelSpec] = []

    def fake_build_many(wanted: Sequence[KernelSpec], *, jobs: int, on_done: Callable[..., None]) -> None:
        assert jobs >= 1
        for spec in wanted:
            attempted.append(spec)
            on_done(spec, CompileError(spec.name))
            time.sleep(0.05)

    monkeypatch.setattr(tune, "build_many", fake_build_many)
    monkeypatch.setattr(tune, "gpu_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = tune.GpuRunner(torch.device("cuda:0"))
    assert [(spec, str(error)) for spec, error in gpu.build(specs)] == [(spec, spec.name) for spec in specs]

    attempted.clear()
    for _ in gpu.build(specs):
        break
    time.sleep(0.3)
    assert len(attempted) < len(specs)

    def fails(*_: object, **__: object) -> None:
        raise CompileError("nothing can be built")

    monkeypatch.setattr(tune, "build_many", fails)
    with pytest.raises(CompileError, match="nothing can be built"):
        list(gpu.build(specs))
