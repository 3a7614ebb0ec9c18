"""Tunes many shapes on one or several GPUs: how time is shared out, who takes which shape, what is done already."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from srelu24.db import Database
from srelu24.dispatch import clear_cache
from srelu24.search import Runner
from srelu24.tune import Lent, tune_ffn
from srelu24.tune_events import Event, ShapeEnded, ShapeStarted, Stopped, TuneReport
from srelu24_gen import cost, space
from srelu24_gen.compile import key_of
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelSpec
from srelu24_gen.target import GpuTarget

DEEP_ENOUGH = 0.5
"""A finished search counts as done if it was given this share of the time that the shape would get now."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds of searching: for each shape, or for all of them together."""

    seconds: float
    per_shape: bool = True

    def of(self, own: float, others: float, elapsed_s: float) -> float:
        """Of a shape whose :func:`weight` is ``own``, while shapes of weight ``others`` wait for the same GPU."""
        if self.per_shape:
            return self.seconds
        return max(1.0, (self.seconds - elapsed_s) * own / (own + others))


def weight(shape: Shape, dtype: DType, target: GpuTarget) -> float:
    """How much of a common budget a shape gets: a fixed part, and more the longer its kernels run."""
    try:
        us = sum(cost.cost(p, space.default(p, target), target).us for p in shape.gemms(dtype))
    except Unsupported:
        return 0.01  # refused at once
    return 1.0 + us / 10_000


@dataclass(frozen=True, slots=True)
class Tuned:
    """What became of one shape on one GPU model: a report, an error, or neither where it had been tuned before."""

    shape: Shape
    gpu: str
    report: TuneReport | None = None
    error: str = ""


@dataclass
class _Queue:
    """Shapes that wait for GPUs of one model. Who is free takes the next one."""

    waiting: deque[Shape]
    gpus: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> tuple[Shape, list[Shape]] | None:
        with self.lock:
            return (self.waiting.popleft(), list(self.waiting)) if self.waiting else None


def tune_shapes(
    shapes: Sequence[Shape],
    dtype: DType,
    runners: Sequence[Runner],
    budget: Budget,
    *,
    density: float = 0.1,
    resume: bool = True,
    dense: bool = False,
    db: Database | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    key: Callable[[KernelSpec], str] = key_of,
) -> list[Tuned]:
    """Tune every shape on every GPU model among the runners, which are closed at the end.

    Runners of one model share its shapes: whoever is free takes the next. Shapes of one width come one after the other,
    so that each starts with the winners of the last; the widest first, whose kernels take longest. A shape that cannot
    be tuned is reported, and the others go on.

    Args:
        runners: one per GPU.
        resume: leave out shapes whose records are complete: of this GPU model, density and today's kernels, searched
            for at least :data:`DEEP_ENOUGH` of the time they would get. Of the others take over what was screened.
        key: the key of a kernel's binary today.

    Returns:
        In the order of ``shapes``, for one GPU model after the other.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was measured is stored.
    """
    db = db or Database.open()
    order = sorted(dict.fromkeys(shapes), key=lambda s: (-s.d * s.f, s.d, -s.m))
    queues = {t: _Queue(deque(order), sum(r.target == t for r in runners)) for t in {r.target for r in runners}}
    found: dict[tuple[str, Shape], Tuned] = {}
    stop = threading.Event()
    errors: list[BaseException] = []
    begin = runners[0].now()

    def serve(runner: Runner) -> None:
        target, queue = runner.target, queues[runner.target]
        while not stop.is_set() and (taken := queue.take()):
            shape, waiting = taken
            own, *others = (weight(s, dtype, target) for s in (shape, *waiting))
            seconds = budget.of(own, sum(others) / queue.gpus, runner.now() - begin)
            left = seconds * (1 + (len(waiting) / queue.gpus if budget.per_shape else sum(others) / queue.gpus / own))
            on_event(ShapeStarted(shape, target.key, seconds, len(order) - len(waiting), len(order), left))
            tuned = Tuned(shape, target.key)
            if not (resume and is_tuned(shape, dtype, target, db, density, seconds, key)):
                try:
                    report = tune_ffn(
                        *shape,
                        dtype,
                        density=density,
                        budget_s=seconds,
                        resume=resume,
                        dense=dense,
                        db=db,
                        on_event=on_event,
                        runner=Lent(runner, stop),
                    )
                    tuned = Tuned(shape, target.key, report)
                except Srelu24Error as error:
                    tuned = Tuned(shape, target.key, error=str(error))
            found[target.key, shape] = tuned
            on_event(ShapeEnded(shape, target.key, tuned.report, tuned.error))

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
            _together([threading.Thread(target=in_thread, args=(r,)) for r in runners], stop)
    if errors:
        raise errors[0]
    clear_cache()
    models = sorted(queues, key=lambda target: target.key)
    return [found[t.key, shape] for t in models for shape in dict.fromkeys(shapes)]


def is_tuned(
    shape: Shape,
    dtype: DType,
    target: GpuTarget,
    db: Database,
    density: float,
    seconds: float,
    key: Callable[[KernelSpec], str] = key_of,
) -> bool:
    """Whether the user's own records answer for the shape, with dense times and kernels as they are built today."""
    mine = {(r.family, r.m, r.n, r.k): r for r in db.user_records() if (r.arch, r.gpu) == (target.arch, target.key)}
    for problem in shape.gemms(dtype):
        record = mine.get((problem.family, problem.m, problem.n, problem.k))
        if record is None or record.density != density or not record.evidence.dense:
            return False
        if (record.evidence.budget_s or 0.0) < DEEP_ENOUGH * seconds:
            return False
        try:
            if key(KernelSpec(problem.family, record.kernel_config(), target.arch)) != record.evidence.source_digest:
                return False
        except Srelu24Error:
            return False
    return True


def _together(threads: list[threading.Thread], stop: threading.Event) -> None:
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
