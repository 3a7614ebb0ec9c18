"""Many shapes on one or several simulated GPUs: time, order, resume, work stealing, and what a kill leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_gpu import H200, FakeGpu
from srelu24.cli import live
from srelu24.db.database import Database
from srelu24.tuning import worker
from srelu24.tuning.events import Event, ShapeEnded, ShapeStarted
from srelu24.tuning.many import Budget, Tuned, Work, tune_shapes, weight
from srelu24.tuning.worker import Job, Outcome
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, KernelSpec
from srelu24_gen.target import TARGETS

FORWARD, BACKWARD = Pass
SHAPES = [Shape(m, d, f) for d, f in ((512, 2048), (1024, 4096)) for m in (256, 1024, 4096)]


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")


def key(spec: KernelSpec) -> str:
    return f"v1-{spec.digest}"


def run(
    db: Database, *gpus: FakeGpu, shapes: list[Shape] = SHAPES, budget: Budget | None = None, **more: object
) -> list[Tuned]:
    budget = budget or Budget(8.0)
    return tune_shapes(shapes, DType.BF16, gpus, budget, db=db, key=key, **more)  # type: ignore[arg-type]


def gpu(**options: object) -> FakeGpu:
    return FakeGpu(overhead=0.05, build_seconds=0.0, **options)  # type: ignore[arg-type]


def recorded(db: Database) -> Counter[tuple[str, Shape]]:
    return Counter((r.gpu, Shape.of(r.problem)) for r in db.user_records())


def test_every_shape_is_tuned_and_answered_in_the_order_it_was_given(db: Database) -> None:
    events: list[Event] = []
    one = gpu()
    found = run(db, one, shapes=SHAPES[::-1], on_event=events.append)
    assert [(t.shape, t.gpu) for t in found] == [(s, "h200") for s in SHAPES[::-1]]
    assert all(t.report and not t.error for t in found)
    assert recorded(db) == {("h200", s): 2 for s in SHAPES}
    assert one.closed
    started = [e for e in events if isinstance(e, ShapeStarted)]
    assert [e.number for e in started] == [1, 2, 3, 4, 5, 6]
    assert [e.shape for e in started] == sorted(SHAPES, key=lambda s: (-s.d, -s.m)), "one width after the other"
    assert [e.shape for e in events if isinstance(e, ShapeEnded)] == [e.shape for e in started]


def test_the_worker_serves_all_shapes(db: Database) -> None:
    closes: list[bool] = []

    class Counting(FakeGpu):
        def close(self) -> None:
            closes.append(True)

    run(db, Counting(overhead=0.05))
    assert closes == [True]


def test_a_total_is_shared_out_by_how_long_the_kernels_run(db: Database) -> None:
    shapes = [Shape(16384, 8192, 32768), Shape(512, 768, 3072), Shape(512, 2048, 8192)]
    events: list[Event] = []
    one = gpu()
    run(db, one, shapes=shapes, budget=Budget(60.0, per_shape=False), on_event=events.append)
    seconds = {e.shape: e.seconds for e in events if isinstance(e, ShapeStarted)}
    assert seconds[shapes[0]] > 1.5 * seconds[shapes[1]]
    assert one.now() == pytest.approx(60, rel=0.3)
    wide, narrow, step = (Work(shapes[i], which) for i, which in ((0, FORWARD), (2, FORWARD), (2, BACKWARD)))
    assert weight(wide, DType.BF16, H200) > weight(narrow, DType.BF16, H200) >= 1
    assert weight(step, DType.BF16, H200) > 2 * weight(narrow, DType.BF16, H200), "five GEMMs, not two"


@pytest.mark.parametrize("seconds", [6.0, 30.0])
def test_a_budget_per_shape_is_each_ones_own(db: Database, seconds: float) -> None:
    events: list[Event] = []
    run(db, gpu(), shapes=SHAPES[:2], budget=Budget(seconds), on_event=events.append)
    assert [e.seconds for e in events if isinstance(e, ShapeStarted)] == [seconds] * 2


def test_what_is_tuned_is_left_out_until_something_changes(db: Database) -> None:
    run(db, gpu(), shapes=SHAPES[:3])
    again = gpu()
    found = run(db, again)
    assert [t.report is None for t in found] == [True] * 3 + [False] * 3
    assert [t.error for t in found] == [""] * 6
    assert {Shape.of(s.problem) for j in again.jobs for c in j.candidates for s in c.steps} == set(SHAPES[3:])

    def tuned(**more: object) -> int:
        return sum(t.report is not None for t in run(db, gpu(), **more))  # type: ignore[arg-type]

    assert tuned() == 0
    assert tuned(resume=False) == 6
    assert tuned(density=0.5) == 6
    assert tuned(density=0.5) == 0
    assert tuned(density=0.5, budget=Budget(9.0)) == 0
    assert tuned(density=0.5, budget=Budget(40.0)) == 6, "a deeper search is another thing"
    assert len(tune_shapes(SHAPES, DType.BF16, [gpu()], Budget(8.0), density=0.5, db=db, key=lambda spec: "other")) == 6


def test_every_pass_of_every_shape_is_tuned_once(db: Database) -> None:
    found = run(db, gpu(), gpu(seed=1), shapes=SHAPES[:2], passes=(FORWARD, BACKWARD))
    assert [(t.shape, t.which) for t in found] == [(s, which) for s in SHAPES[:2] for which in (FORWARD, BACKWARD)]
    assert all(t.report for t in found)
    assert recorded(db) == {("h200", s): 2 + 5 for s in SHAPES[:2]}
    again = run(db, gpu(), shapes=SHAPES[:3], passes=(BACKWARD,))
    assert [t.report is None for t in again] == [True, True, False], "no dense times are missed in training"
    assert [t.report is None for t in run(db, gpu(), shapes=SHAPES[:3])] == [True, True, False]


def test_a_shape_that_fails_is_reported_and_the_others_go_on(db: Database) -> None:
    shapes = [Shape(256, 12, 64), *SHAPES[:2]]
    found = run(db, gpu(), shapes=shapes)
    assert "multiple of 8" in found[0].error
    assert all(t.report for t in found[1:])


def test_gpus_of_one_model_share_the_shapes(db: Database) -> None:
    barrier = threading.Barrier(3, timeout=20)

    class Waits(FakeGpu):
        def run(self, job: Job) -> Iterator[Outcome]:
            if not self.jobs:
                barrier.wait()  # all three are at work at once
            return super().run(job)

    gpus = [Waits(overhead=0.05, build_seconds=0.0, seed=seed) for seed in range(3)]
    found = run(db, *gpus)
    assert all(t.report for t in found)
    assert recorded(db) == {("h200", s): 2 for s in SHAPES}
    per_gpu = [{Shape.of(s.problem) for j in g.jobs for c in j.candidates for s in c.steps} for g in gpus]
    assert all(per_gpu)
    assert sum(map(len, per_gpu)) == len(SHAPES), "no shape twice"
    assert all(g.closed for g in gpus)


def test_results_of_two_models_never_mix(db: Database) -> None:
    first, second = gpu(), gpu()
    second.target = TARGETS["h100"]
    found = run(db, first, second)
    assert Counter(t.gpu for t in found) == {"h100": 6, "h200": 6}
    assert recorded(db) == {(g, s): 2 for g in ("h100", "h200") for s in SHAPES}
    assert {t.gpu for t in db.all_trials()} == {"h100", "h200"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a bug")])
def test_what_ends_one_gpu_ends_all_and_leaves_no_false_failure(db: Database, error: BaseException) -> None:
    class Ends(FakeGpu):
        def run(self, job: Job) -> Iterator[Outcome]:
            if len(self.jobs) == 3:
                raise error
            return super().run(job)

    gpus = [Ends(overhead=0.05), gpu(), gpu()]
    with pytest.raises(type(error) if isinstance(error, Exception) else error):  # type: ignore[arg-type]
        run(db, *gpus, shapes=[Shape(m, 512, 2048) for m in range(64, 6464, 64)])
    assert all(g.closed for g in gpus)
    assert len(recorded(db)) < 100
    assert not [t for t in db.all_trials() if t.outcome == "failed"]


def test_the_live_view_draws_many_shapes(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with live.live_view() as draw:
        run(db, gpu(), shapes=[SHAPES[0], Shape(256, 12, 64)], on_event=draw)
        run(db, gpu(), shapes=[SHAPES[0]], on_event=draw)
    shown = " ".join(capsys.readouterr().err.split())
    assert "failed: 256x12x64" in shown
    assert f"{SHAPES[0]} forward is tuned on h200 already" in shown
    assert "the sparse pair is 1.500x as fast" in shown or "Dense at best" in shown


KILLED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from fake_gpu import FakeGpu
from srelu24.db.database import Database
from srelu24.tuning.many import Budget, tune_shapes
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType

class Slow(FakeGpu):
    def run(self, job):
        print("job", flush=True)
        return super().run(job)

db = Database.open(Path("/nonexistent"), Path({file!r}))
shapes = [Shape(m, 512, 2048) for m in (256, 512, 1024, 2048, 4096)]
gpu = Slow(overhead=0.05, build_seconds=0.0)
tune_shapes(shapes, DType.BF16, [gpu], Budget(8.0), db=db, key=lambda s: "v1-" + s.digest)
"""


def test_kill_9_loses_nothing_that_was_measured_and_the_next_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "tuning.sqlite"
    script = textwrap.dedent(KILLED).format(path=sys.path, file=str(file))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=worker.child_environment()
    ) as child:
        assert child.stdout
        for _ in range(16):
            assert child.stdout.readline() == b"job\n"
        os.kill(child.pid, signal.SIGKILL)
    db = Database.open(tmp_path / "none", file)
    done, trials = recorded(db), db.all_trials()
    assert 0 < len(done) < 5
    assert set(done.values()) <= {1, 2}
    assert len(trials) > 20
    shapes = [Shape(m, 512, 2048) for m in (256, 512, 1024, 2048, 4096)]
    again = gpu()
    found = run(db, again, shapes=shapes)
    complete = {shape for (_, shape), records in done.items() if records == 2}
    assert {t.shape for t in found if t.report is None} == complete
    assert recorded(db) == {("h200", s): 2 for s in shapes}
    assert db.all_trials()[: len(trials)] == trials


def test_budgets_share_what_is_left() -> None:
    assert Budget(100, per_shape=False).of(1.0, 3.0, 20.0) == pytest.approx(20)
    assert Budget(100, per_shape=False).of(1.0, 3.0, 200.0) == 1.0
    assert Budget(7.0).of(1.0, 3.0, 200.0) == 7.0
    assert weight(Work(Shape(8, 12, 64), FORWARD), DType.BF16, H200) < 0.1
