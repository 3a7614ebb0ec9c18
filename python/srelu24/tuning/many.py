"""Tunes many shapes on one or several GPUs: shares out the time and the shapes, and leaves out what is tuned."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from srelu24.db.database import Database
from srelu24.runtime.dispatch import clear_cache
from srelu24.tuning.events import Event, ShapeEnded, ShapeStarted, Stopped, TuneReport
from srelu24.tuning.search import Runner
from srelu24.tuning.tuner import BorrowedRunner, dispatcher_chooses, tune_ffn
from srelu24_gen import cost
from srelu24_gen.compile import key_of
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import Activation, DType, KernelSpec
from srelu24_gen.target import GpuTarget

DEEP_ENOUGH = 0.5
"""A finished search counts as done if it was given this share of the time that the shape would get now."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds of searching: for each pass of a shape, or for all of them together."""

    seconds: float
    per_shape: bool = True

    def of(self, own: float, others: float, elapsed_s: float) -> float:
        """Seconds of a search of :func:`weight` ``own``, while searches of weight ``others`` wait for the same GPU."""
        if self.per_shape:
            return self.seconds
        return max(1.0, (self.seconds - elapsed_s) * own / (own + others))


class Work(NamedTuple):
    """One pass of one shape, which one search tunes."""

    shape: Shape
    which: Pass


def weight(work: Work, dtype: DType, target: GpuTarget, activation: Activation = Activation.RELU2) -> float:
    """How much of a common budget a search gets: a fixed part for each GEMM, and more the longer they run."""
    gemms = work.shape.gemms_of(work.which, dtype, activation=activation)
    try:
        us = sum(cost.cost(p, cost.best(p, target), target).us for p in gemms)
    except Unsupported:
        return 0.01  # refused at once
    return 0.5 * len(gemms) + us / 10_000


@dataclass(frozen=True, slots=True)
class Tuned:
    """What became of a pass of one shape on one GPU model: a report, an error, or neither where it had been tuned
    before."""

    shape: Shape
    which: Pass
    gpu: str
    report: TuneReport | None = None
    error: str = ""


@dataclass
class _Queue:
    """Searches that wait for GPUs of one model. A GPU that is free takes the next one."""

    waiting: deque[Work]
    gpus: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> tuple[Work, list[Work]] | None:
        with self.lock:
            return (self.waiting.popleft(), list(self.waiting)) if self.waiting else None


def tune_shapes(
    shapes: Sequence[Shape],
    dtype: DType,
    runners: Sequence[Runner],
    budget: Budget,
    *,
    passes: Sequence[Pass] = (Pass.FORWARD,),
    activation: Activation = Activation.RELU2,
    density: float = 0.1,
    resume: bool = True,
    dense: bool = False,
    db: Database | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    key: Callable[[KernelSpec], str] = key_of,
) -> list[Tuned]:
    """Tune every pass of every shape on every GPU model among the runners, which are closed at the end.

    Runners of one model share the work: one that is free takes the next search. Shapes of one width come one after the
    other, so that each starts with the winners of the last; the widest first, whose kernels take longest. A shape that
    cannot be tuned is reported, and the others go on.

    Args:
        runners: one per GPU.
        passes: of every shape.
        activation: between the layers of every shape.
        resume: leave out what has complete records: of this GPU model, density and today's kernels, searched for at
            least :data:`DEEP_ENOUGH` of the time it would get. Of the rest take over what was screened.
        key: the key of a kernel's binary today.

    Returns:
        In the order of ``shapes``, for one GPU model after the other, and of each shape in that of ``passes``.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was measured is stored.
    """
    db = db or Database.open()
    wanted = [Work(shape, which) for shape in dict.fromkeys(shapes) for which in dict.fromkeys(passes)]
    order = sorted(wanted, key=lambda w: (-w.shape.d * w.shape.f, w.shape.d, w.which is not Pass.FORWARD, -w.shape.m))
    queues = {t: _Queue(deque(order), sum(r.target == t for r in runners)) for t in {r.target for r in runners}}
    found: dict[tuple[str, Work], Tuned] = {}
    stop = threading.Event()
    errors: list[BaseException] = []
    begin = runners[0].now()

    def serve(runner: Runner) -> None:
        target, queue = runner.target, queues[runner.target]
        while not stop.is_set() and (taken := queue.take()):
            work, waiting = taken
            own, *others = (weight(w, dtype, target, activation) for w in (work, *waiting))
            seconds = budget.of(own, sum(others) / queue.gpus, runner.now() - begin)
            left = seconds * (1 + (len(waiting) / queue.gpus if budget.per_shape else sum(others) / queue.gpus / own))
            on_event(ShapeStarted(*work, target.key, seconds, len(order) - len(waiting), len(order), left))
            tuned = Tuned(*work, target.key)
            if not (resume and is_tuned(work, dtype, target, db, density, seconds, key, activation)):
                try:
                    report = tune_ffn(
                        *work.shape,
                        dtype,
                        which=work.which,
                        activation=activation,
                        density=density,
                        budget_s=seconds,
                        resume=resume,
                        dense=dense,
                        db=db,
                        on_event=on_event,
                        runner=BorrowedRunner(runner, stop),
                    )
                    tuned = Tuned(*work, target.key, report)
                except Srelu24Error as error:
                    tuned = Tuned(*work, target.key, error=str(error))
            found[target.key, work] = tuned
            on_event(ShapeEnded(*work, target.key, tuned.report, tuned.error))

    def in_thread(runner: Runner) -> None:
        try:
            serve(runner)
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)
            stop.set()

    with contextlib.ExitStack() as closing:
        for runner in runners:
            closing.callback(runner.close)
        if len(runners) == 1:
            serve(runners[0])
        else:
            _run_threads([threading.Thread(target=in_thread, args=(r,)) for r in runners], stop)
    if errors:
        raise errors[0]
    clear_cache()
    models = sorted(queues, key=lambda target: target.key)
    return [found[t.key, work] for t in models for work in wanted]


def is_tuned(
    work: Work,
    dtype: DType,
    target: GpuTarget,
    db: Database,
    density: float,
    seconds: float,
    key: Callable[[KernelSpec], str] = key_of,
    activation: Activation = Activation.RELU2,
) -> bool:
    """Whether the user's own records make another search needless.

    Each GEMM has one, of today's binary and this density, from a search that was long enough. Where calls choose
    between sparse and dense, the records have the dense FFNs' times.
    """
    mine = {(r.family, r.m, r.n, r.k): r for r in db.user_records() if (r.arch, r.gpu) == (target.arch, target.key)}
    for problem in work.shape.gemms_of(work.which, dtype, activation=activation):
        record = mine.get((problem.family, problem.m, problem.n, problem.k))
        if record is None or record.density != density:
            return False
        if not record.evidence.dense and dispatcher_chooses(work.which, dtype):
            return False
        if (record.evidence.budget_s or 0.0) < DEEP_ENOUGH * seconds:
            return False
        try:
            if key(KernelSpec(problem.family, record.kernel_config(), target.arch)) != record.evidence.source_digest:
                return False
        except Srelu24Error:
            return False
    return True


def _run_threads(threads: list[threading.Thread], stop: threading.Event) -> None:
    """Runs threads to their end. Ctrl-C sets ``stop`` and waits for them."""
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that Ctrl-C is heard
    finally:
        stop.set()
        for thread in threads:
            thread.join()
