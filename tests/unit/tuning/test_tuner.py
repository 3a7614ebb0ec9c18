"""The search on simulated GPUs."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import fake_child
from fake_gpu import DEFAULTS, GEMM1, GEMM2, GOOD, H200, NEXT, OTHERS, D, F, FakeGpu, M, better
from srelu24.cli import live
from srelu24.db.choice import answer
from srelu24.db.database import Database
from srelu24.db.records import Trial
from srelu24.runtime.dense import WAYS
from srelu24.tuning import tuner
from srelu24.tuning.events import Advanced, Event, Failure, Finished, StageStarted
from srelu24.tuning.search import FEWEST
from srelu24.tuning.tuner import tune_ffn
from srelu24.tuning.worker import Job, Outcome, Worker
from srelu24_gen import cost, paths, space
from srelu24_gen.errors import CompileError, LaunchError, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelConfig, KernelSpec, Op, Problem


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")


def run(db: Database, gpu: FakeGpu, **options: object) -> tuner.TuneReport:
    """Tune with time enough for all candidates, unless the options say otherwise."""
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
        assert (evidence.sm_mhz, evidence.watts, evidence.throttled) == (1500.0, 690.0, False)
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


def screening_order(gpu: FakeGpu, problem: Problem) -> list[KernelConfig]:
    """Configurations besides the default in the order of their first timing."""
    jobs = [[c.steps[0] for c in job.candidates] for job in gpu.jobs if job.min_rounds == 5]
    return [step.config for steps in jobs for step in steps[1:] if step.problem == problem and step.config]


def test_every_binary_is_screened_before_any_variant_and_the_model_decides_the_order(db: Database) -> None:
    gpu = FakeGpu()
    run(db, gpu)
    for problem, default, others in zip((GEMM1, GEMM2), DEFAULTS, OTHERS, strict=True):
        order = screening_order(gpu, problem)
        binaries = {c.compiled() for c in others} - {default.compiled()}
        first = order[: len(binaries)]
        assert {c.compiled() for c in first} == binaries
        predicted = [min(cost.cost(problem, o, H200).us for o in others if o.compiled() == c.compiled()) for c in first]
        assert predicted == sorted(predicted)


def test_little_time_goes_to_what_the_model_ranks_best(db: Database) -> None:
    gpu = FakeGpu(overhead=0.05, build_seconds=0.0)
    report = run(db, gpu, budget_s=3.5)
    for problem, default in zip((GEMM1, GEMM2), DEFAULTS, strict=True):
        order = screening_order(gpu, problem)
        assert len(order) == FEWEST
        best = next(c for c in cost.rank(problem, H200) if c.compiled() != default.compiled())
        assert order[0].compiled() == best.compiled()
    assert report.skipped == len(OTHERS[0]) + len(OTHERS[1]) - 2 * FEWEST
    assert report.seconds < 8


def test_winners_of_other_token_counts_are_tried_first_even_in_little_time(db: Database) -> None:
    run(db, FakeGpu(better(*GOOD)))
    gpu = FakeGpu(better(*GOOD), overhead=0.1)
    report = tune_ffn(2 * M, D, F, DType.BF16, db=db, runner=gpu, budget_s=4.0)
    assert [r.kernel_config() for r in report.records] == list(GOOD)
    for problem, good in zip((GEMM1, GEMM2), GOOD, strict=True):
        assert screening_order(gpu, dataclasses.replace(problem, m=2 * M))[0] == good


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
    assert {f.reason for f in report.pruned} == {"its binary failed with other runtime fields"}
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


def test_dense_ffns_are_timed_beside_the_pairs_in_every_search(db: Database) -> None:
    gpu = FakeGpu(lambda problem, config: 1.3 if problem.family.op is Op.GEMM else 1.0)
    report = run(db, gpu)
    expected = {"cublas": 1.5, "mixed": 1.4, "gemm": 1.3}  # FakeGpu.cublas is 1.5, the pair is 1.0 each
    for record in report.records:
        assert set(record.evidence.dense) == set(WAYS) == set(expected)
        for way, dense in record.evidence.dense.items():
            assert dense.speedup == pytest.approx(expected[way], rel=0.02)
            assert 1 < dense.low <= dense.speedup
            assert dense.ms / report.pair_ms == pytest.approx(expected[way], rel=0.1)
        best = record.evidence.best_dense
        assert best
        assert best[0] == "gemm"
    assert not [t for t in trials(db) if t.family.op is Op.GEMM], "they are no trials of this search"


def test_dense_ffns_are_timed_as_the_dispatcher_would_run_them(tmp_path: Path) -> None:
    # The shipped records of dense GEMMs are for few tokens, and their tiles do not fit many.
    db = Database.open(paths.shipped_records_dir(), tmp_path / "tuning.sqlite")
    shape = Shape(16384, 8192, 8192)
    ways = tuner.dense_ways(shape, DType.BF16, False, H200, db)
    problems = shape.dense_gemms(DType.BF16)
    assert [step.config for step in ways["gemm"]] == [answer(problem, H200, db).config for problem in problems]
    for problem, step in zip(problems, ways["gemm"], strict=True):
        nearest = db.find(problem, H200)
        assert nearest
        assert nearest.config != step.config


def test_a_dense_ffn_that_fails_costs_only_itself(db: Database) -> None:
    first, _ = Shape(M, D, F).dense_gemms(DType.BF16)
    gpu = FakeGpu()
    gpu.hanging = [first]
    report = run(db, gpu)
    assert set(report.records[0].evidence.dense) == {"cublas"}
    assert {f.reason for f in report.failures} == {"no answer within 30 s; the kernel hangs"}


def test_dense_gemms_are_tuned_first_where_asked_for(db: Database) -> None:
    report = run(db, FakeGpu(), dense=True)
    assert [r.family.op for r in report.records] == [Op.GEMM_RELU2_24, Op.SPGEMM, Op.GEMM, Op.GEMM]
    assert report.seconds < 600 * 1.2


def test_a_winner_that_is_wrong_at_full_size_makes_way_for_the_next(db: Database) -> None:
    second = next(c for c in OTHERS[1] if c.compiled() != GOOD[1].compiled())
    gpu = FakeGpu(lambda problem, config: {GOOD[0]: 0.9, GOOD[1]: 0.8, second: 0.85}.get(config, 1.0))
    gpu.wrong_at_full_size = [GOOD[1]]
    report = run(db, gpu)
    assert [r.kernel_config() for r in report.records] == [GOOD[0], second]
    assert "wrong result" in report.failures[-1].reason
    assert [t.reason for t in trials(db) if t.stage == "pair" and t.outcome == "failed"]
    gpu = FakeGpu()
    gpu.wrong_at_full_size = [DEFAULTS[0]]
    with pytest.raises(LaunchError, match=r"default.*wrong result"):
        run(db, gpu, resume=False)


def test_a_whole_search_survives_candidates_that_hang_crash_break_the_device_and_are_wrong(db: Database) -> None:
    class RealWorker(FakeGpu):
        """The tuner's own worker process, with a child whose device is made up."""

        child = Worker("fake", step_seconds=0.5, command=(sys.executable, "-S", str(fake_child.__file__)))

        def run(self, job: Job) -> Iterator[Outcome]:
            self.clock += 0.1
            return self.child.run(job)

        def close(self) -> None:
            self.child.close()

    report = run(db, RealWorker(), budget_s=20.0)
    fates = {fake_child.fate(t.config): t.reason for t in trials(db) if t.outcome == "failed"}
    assert set(fates) == {"hangs", "crashes", "breaks", "wrong"}
    assert "no answer within 0.5 s" in fates["hangs"]
    assert "illegal memory access" in fates["crashes"]
    assert "misaligned" in fates["breaks"]
    assert "wrong result" in fates["wrong"]
    right = [t for t in trials(db) if t.outcome == "ok"]
    assert {fake_child.fate(t.config) for t in right} == {"right"}
    assert len(right) > 40
    assert len(report.records) == 2


def test_throttling_spread_and_outliers_are_evidence(db: Database) -> None:
    gpu = FakeGpu(drift=0.0)
    gpu.throttled = True
    evidence = run(db, gpu).records[0].evidence
    assert evidence.throttled
    assert all(t.throttled for t in trials(db) if t.outcome == "ok")
    assert evidence.spread == pytest.approx(0.0135, rel=0.8), "1.35 sigma of 1 % noise"
    assert evidence.outliers <= evidence.samples // 10
    assert evidence.budget_s == 600


def test_tuning_twice_gives_winners_within_2_percent(tmp_path: Path) -> None:
    costs: dict[KernelConfig, float] = {}
    rng = random.Random(5)
    for config in (*OTHERS[0], *OTHERS[1], *DEFAULTS):
        costs.setdefault(config, rng.uniform(0.93, 1.1))
    chosen = []
    for seed in range(4):
        report = run(Database.open(tmp_path, tmp_path / f"{seed}.sqlite"), FakeGpu(lambda p, c: costs[c], seed=seed))
        chosen.append(sum(costs[r.kernel_config()] for r in report.records))
    assert max(chosen) / min(chosen) < 1.02


def test_bias_is_part_of_the_problem(db: Database) -> None:
    report = run(db, FakeGpu(), bias=True)
    assert [r.family.name for r in report.records] == ["gemm_relu2_24_bf16_bias", "spgemm_bf16_bias"]


def test_what_cannot_be_tuned_is_refused_before_anything_runs(db: Database) -> None:
    for m, d, f, match in ((0, D, F, "at least one token"), (M, 12, F, "multiple of 8")):
        gpu = FakeGpu()
        with pytest.raises(Unsupported, match=match):
            tune_ffn(m, d, f, DType.BF16, db=db, runner=gpu)
        assert gpu.jobs == []
    with pytest.raises(Unsupported, match="on an NVIDIA GPU and the device is cpu"):
        tune_ffn(M, D, F, DType.BF16, db=db, device="cpu")


def test_events_tell_the_whole_story_and_the_live_view_takes_them(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    gpu = FakeGpu(better(*GOOD), broken=[NEXT])
    with live.live_view() as draw:
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


def test_8_bit_kernels_are_searched_without_dense_ffns_beside_them(db: Database) -> None:
    gpu = FakeGpu()
    report = tune_ffn(M, D, F, DType.E4M3, db=db, runner=gpu, budget_s=600.0)
    assert [record.family.name for record in report.records] == ["gemm_relu2_24_e4m3_to_e4m3", "spgemm_e4m3_to_bf16"]
    steps = [step for job in gpu.jobs for candidate in job.candidates for step in candidate.steps]
    assert {step.problem.family.op for step in steps} == {Op.GEMM_RELU2_24, Op.SPGEMM}
    assert {step.config.tile_k for step in steps if step.config} == {128}
