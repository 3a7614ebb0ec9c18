"""The tuner: finds the fastest kernels for an FFN or its training on this GPU, and stores them with their evidence.

How it searches is in :mod:`srelu24.tuning.search`; here it meets the GPU, the compiler and the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from srelu24.db.choice import answer
from srelu24.db.database import Database
from srelu24.measuring.machine import environment, require_gpu
from srelu24.runtime.dispatch import clear_cache, gpu_of
from srelu24.tuning.events import (
    Event,
    Finished,
    Stopped,
    TuneReport,
)
from srelu24.tuning.search import Runner, Search
from srelu24.tuning.worker import Job, Outcome, Step, Worker
from srelu24_gen.compile import BuiltKernel, build_many
from srelu24_gen.errors import CompileError, Srelu24Error, Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import Activation, DType, KernelSpec, Problem
from srelu24_gen.target import GpuTarget


def tune_ffn(
    m: int,
    d: int,
    f: int,
    dtype: DType,
    *,
    which: Pass = Pass.FORWARD,
    bias: bool = False,
    activation: Activation = Activation.RELU2,
    density: float = 0.1,
    budget_s: float = 120.0,
    resume: bool = True,
    dense: bool = False,
    device: torch.device | str = "cuda",
    db: Database | None = None,
    on_event: Callable[[Event], None] | None = None,
    runner: Runner | None = None,
) -> TuneReport:
    """Search for the best configurations of an FFN of M tokens, width D and hidden width F.

    Every trial is on disk as soon as it is known, so an interrupt loses nothing that was measured.

    Args:
        which: the two GEMMs of inference, or those of a training step.
        bias: whether both layers have one.
        activation: between the layers.
        density: share of non-zero activations in the data it is timed on.
        budget_s: seconds for the search; what was begun is finished.
        resume: take over candidates that were screened before, of the same binary, GPU and density.
        dense: tune our dense GEMMs first, with a third of the time. Timed beside the sparse pair of inference they are
            in any case; a training step has none.
        device: the GPU to tune.
        db: where trials and records go; the user's database by default.
        on_event: called with every :data:`~srelu24.tuning.events.Event`; :func:`srelu24.cli.live.live_view` gives one
            that draws.
        runner: replaces the GPU and the compiler.

    Raises:
        Unsupported: the sizes or the device are not supported.
        CompileError, LaunchError: a default configuration cannot be built or does not run.
        RecordError: the database cannot be written.
    """
    shape = Shape(m, d, f)
    if m < 1:
        raise Unsupported(f"M is {m}; tuning needs at least one token")
    db = db or Database.open()
    emit = on_event or (lambda event: None)
    runner = runner or GpuRunner(torch.device(device))
    reports: list[TuneReport] = []
    with contextlib.closing(runner):
        runner.start()
        begin = runner.now()
        chooses = dispatcher_chooses(which, dtype)
        if dense and chooses:
            chain = shape.dense_gemms(dtype, bias, bias, activation)
            reports.append(Search(chain, runner, db, density, budget_s / 3, resume, emit).run())
            budget_s -= budget_s / 3
        beside = dense_ways(shape, dtype, bias, runner.target, db, activation) if chooses else {}
        gemms = shape.gemms_of(which, dtype, bias, bias, activation)
        reports.append(Search(gemms, runner, db, density, budget_s, resume, emit, beside).run())
    records = [record for report in reversed(reports) for record in report.records]
    report = dataclasses.replace(reports[-1], records=records, seconds=runner.now() - begin)
    clear_cache()  # so that this process runs what was found
    emit(Finished(report))
    return report


def dispatcher_chooses(which: Pass, dtype: DType) -> bool:
    """Whether a call of the FFN chooses between sparse and dense by the recorded times (docs/tuning.md).

    In 8 bits and in training nothing is chosen.
    """
    return which is Pass.FORWARD and dtype is not DType.E4M3


def dense_ways(
    shape: Shape,
    dtype: DType,
    bias: bool,
    target: GpuTarget,
    db: Database,
    activation: Activation = Activation.RELU2,
) -> dict[str, tuple[Step, ...]]:
    """The dense FFNs that the dispatcher could run instead, by :data:`srelu24.runtime.dense.WAYS`.

    Our GEMMs have the configurations that the dispatcher would choose.
    """
    first, second = shape.dense_gemms(dtype, bias, bias, activation)

    def own(problem: Problem) -> Step:
        return Step(problem, answer(problem, target, db).config)

    return {
        "cublas": (Step(first, None), Step(second, None)),
        "mixed": (own(first), Step(second, None)),
        "gemm": (own(first), own(second)),
    }


class GpuRunner:
    """A GPU, its worker process, and compilers on the other cores. Source of the idea: Inductor's autotuner."""

    def __init__(self, device: torch.device) -> None:
        require_gpu(device, "tuning times kernels")
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.target = gpu_of(self._device)
        self._worker = Worker(str(self._device))
        self._built: dict[KernelSpec, str] = {}
        self._versions: dict[str, str] = {}

    def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
        """Compiles in the background, so that the GPU times what is finished; what was built before comes first."""
        for spec in specs:
            if key := self._built.get(_binary_of(spec)):
                yield spec, key
        specs = [spec for spec in specs if _binary_of(spec) not in self._built]
        if not specs:
            return
        done: queue.SimpleQueue[tuple[KernelSpec, str | Srelu24Error] | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def on_done(spec: KernelSpec, outcome: BuiltKernel | Srelu24Error) -> None:
            done.put((spec, _key_or_fault(outcome)))
            if stop.is_set():
                raise InterruptedError("the search that wanted these kernels has ended")

        def work() -> None:
            try:
                build_many(specs, jobs=max(1, len(os.sched_getaffinity(0)) - 1), on_done=on_done)
                done.put(None)
            except BaseException as error:  # handed to the thread that waits
                done.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (item := done.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item[1], str):
                    self._built[_binary_of(item[0])] = item[1]
                yield item
        finally:
            stop.set()

    def start(self) -> None:
        self._worker.start()

    def run(self, job: Job) -> Iterator[Outcome]:
        return self._worker.run(job)

    def versions(self) -> dict[str, str]:
        if not self._versions:
            names = ("driver", "power_limit_watts", "cuda", "torch", "nvrtc", "cutlass", "srelu24", "commit")
            found = environment(self._device)
            self._versions = {name: str(found[name]) for name in names if found.get(name) is not None}
        return self._versions

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self._worker.close()


class BorrowedRunner:
    """A runner for one of many searches: it stays open when the search ends; ``stop`` ends the search."""

    def __init__(self, runner: Runner, stop: threading.Event | None = None) -> None:
        self.target, self.build, self.versions, self.now = runner.target, runner.build, runner.versions, runner.now
        self.start = runner.start
        self._runner, self._stop = runner, stop

    def run(self, job: Job) -> Iterator[Outcome]:
        """Raises :class:`~srelu24.tuning.events.Stopped` once ``stop`` is set."""
        for outcome in self._runner.run(job):
            if self._stop is not None and self._stop.is_set():
                raise Stopped  # before what a killed child leaves behind is taken for a result
            yield outcome

    def close(self) -> None:
        """Nothing: the child and its loaded kernels serve the next search."""


def _key_or_fault(outcome: BuiltKernel | Srelu24Error) -> str | Srelu24Error:
    """The key of a kernel that is worth timing. One that spills or serialises its MMAs is a failure of its trial."""
    if not isinstance(outcome, BuiltKernel):
        return outcome
    if fault := outcome.meta.fault:
        return CompileError(f"{outcome.meta.name} is not worth timing: {fault}")
    return outcome.meta.key


def _binary_of(spec: KernelSpec) -> KernelSpec:
    return dataclasses.replace(spec, config=spec.config.compiled())
