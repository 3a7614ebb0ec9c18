"""Recorded winners run again on this GPU. torch is imported only where kernels run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from srelu24.db.records import TuningRecord
from srelu24_gen import space
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import KernelConfig
from srelu24_gen.target import GpuTarget


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of running a record's kernel again."""

    record: TuningRecord
    outcome: Literal["right", "failed", "unusable"]
    """Unusable: this version would not choose it, so it was not run."""
    detail: str = ""


class Runner(Protocol):
    """What verifying needs of a GPU; tests replace it."""

    @property
    def target(self) -> GpuTarget: ...

    def check(self, record: TuningRecord, config: KernelConfig) -> str:
        """Run the kernel on data of the record's sizes and density; what is wrong, or an empty text."""

    def close(self) -> None: ...


def verify(
    records: Sequence[TuningRecord], runner: Runner, on_done: Callable[[Verdict], None] = lambda verdict: None
) -> list[Verdict]:
    """Run every winner of this GPU model again and hold its output to the reference; other GPUs' are left out."""
    verdicts = []
    for record in of_gpu(records, runner.target):
        verdicts.append(_verdict(record, runner))
        on_done(verdicts[-1])
    return verdicts


def of_gpu(records: Iterable[TuningRecord], target: GpuTarget) -> list[TuningRecord]:
    """The records of that very GPU model."""
    return [r for r in records if (r.arch, r.gpu) == (target.arch, target.key)]


def _verdict(record: TuningRecord, runner: Runner) -> Verdict:
    try:
        config = record.kernel_config()
    except Unsupported as error:
        return Verdict(record, "unusable", str(error))
    supported = space.supports(record.problem, config, runner.target)
    if not supported.ok:
        return Verdict(record, "unusable", supported.reason)
    wrong = runner.check(record, config)
    return Verdict(record, "failed" if wrong else "right", wrong)


class GpuRunner:
    """The current CUDA device. Kernels run in a child process: one that hangs or crashes fails alone."""

    def __init__(self) -> None:
        """Raises Unsupported where there is no GPU that kernels run on."""
        try:
            import torch
        except ImportError:
            visible = False
        else:
            visible = torch.cuda.is_available()
        if not visible:
            raise Unsupported(
                "verifying runs kernels on an NVIDIA GPU and PyTorch sees none; run `srelu24 doctor` to find out why"
            )
        from srelu24.runtime.dispatch import gpu_of
        from srelu24.tuning.worker import Worker

        device = torch.device("cuda", torch.cuda.current_device())
        self._target = gpu_of(device)
        self._worker = Worker(str(device), step_seconds=120)  # a step may compile, too

    @property
    def target(self) -> GpuTarget:
        return self._target

    def check(self, record: TuningRecord, config: KernelConfig) -> str:
        from srelu24.tuning.worker import Candidate, Failed, Job, Step

        # A job verifies before it times, and times at least one round.
        kernel = Candidate(str(record), (Step(record.problem, config),))
        job = Job((kernel,), density=record.density, seconds=0.0, min_rounds=1, arch=record.arch)
        failures = [outcome.reason for outcome in self._worker.run(job) if isinstance(outcome, Failed)]
        return "; ".join(failures)

    def close(self) -> None:
        self._worker.close()
