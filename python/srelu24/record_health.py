"""What tuning records are still worth: against other records, against today's kernels, and run on this GPU.

Nothing here changes the database. torch is imported only where kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from srelu24.records import Trial, TuningRecord
from srelu24_gen import compile as compiler
from srelu24_gen import space
from srelu24_gen.errors import RenderError, Unsupported
from srelu24_gen.spec import Family, KernelConfig, KernelSpec
from srelu24_gen.target import GpuTarget, Toolchain

Row = TypeVar("Row", TuningRecord, Trial)

# --- against other records ---


@dataclass(frozen=True, slots=True)
class Difference:
    """One problem on one GPU, as two sets of records have it."""

    what: Literal["new", "missing", "config", "evidence", "same"]
    """Only yours, only theirs, another configuration, the same one with other evidence, or equal in all."""
    yours: TuningRecord | None
    theirs: TuningRecord | None
    speedup: float | None = None
    """Their time / your time: above 1 your evidence is faster. None where they were not timed on the same density."""


def diff(yours: Iterable[TuningRecord], theirs: Iterable[TuningRecord]) -> list[Difference]:
    """Every problem and GPU that either side has a record for, sorted."""
    ours, others = ({r.key: r for r in side} for side in (yours, theirs))
    return [_difference(ours.get(key), others.get(key)) for key in sorted(ours.keys() | others.keys())]


def _difference(yours: TuningRecord | None, theirs: TuningRecord | None) -> Difference:
    if yours is None or theirs is None:
        return Difference("missing" if yours is None else "new", yours, theirs)
    speedup = theirs.evidence.ms / yours.evidence.ms if yours.density == theirs.density else None
    if _comparable_config(yours) != _comparable_config(theirs):
        return Difference("config", yours, theirs, speedup)
    return Difference("same" if yours == theirs else "evidence", yours, theirs, speedup)


def _comparable_config(record: TuningRecord) -> KernelConfig | dict[str, Any]:
    """Parsed, so that a field left out equals its default; as it is where this version cannot parse it."""
    try:
        return record.kernel_config()
    except Unsupported:
        return record.config


# --- against today's kernels ---


@dataclass(frozen=True, slots=True)
class Stale(Generic[Row]):
    """A row whose times are of another binary than its configuration has today. It is still a hint."""

    row: Row
    reason: str


def stale(rows: Iterable[Row], key_of: Callable[[KernelSpec], str] | None = None) -> list[Stale[Row]]:
    """The rows whose kernels have changed since they were timed, and those whose kernels this version cannot make.

    A trial without a digest never became a binary; it does not become stale.

    Args:
        key_of: the key of a kernel's binary today, by default :func:`srelu24_gen.compile.key_of`.

    Raises:
        ToolchainError: nothing can be compiled here, so there are no keys to compare with.
    """
    key_today = functools.cache(key_of or compiler.key_of)
    found = []
    for row in rows:
        try:
            changed = any(then and then != key_today(spec) for then, spec in _binaries(row))
            reason = _what_changed(row) if changed else ""
        except (Unsupported, RenderError) as error:
            reason = str(error)
        if reason:
            found.append(Stale(row, reason))
    return found


def _binaries(row: TuningRecord | Trial) -> Iterator[tuple[str, KernelSpec]]:
    """The binaries a row rests on: the key each had then, and its spec."""

    def spec(family: Family, config: KernelConfig) -> KernelSpec:
        return KernelSpec(family, config.compiled(), row.arch)

    first = spec(row.family, row.kernel_config())
    if isinstance(row, TuningRecord):
        yield row.evidence.source_digest, first
        return
    digest, *later = row.source_digest.split("+")
    yield digest, first
    step = row.then
    while step is not None and later:
        yield later.pop(0), spec(step.family, KernelConfig.from_dict(step.config))
        step = step.then


def _what_changed(row: TuningRecord | Trial) -> str:
    """The compiler, where the evidence names another one; otherwise it can only be the sources."""
    if isinstance(row, Trial):
        return "kernel sources or compiler changed"
    toolchain, then = Toolchain.find(), row.evidence.versions
    today: Mapping[str, str] = {"nvrtc": toolchain.nvrtc_version, "cutlass": toolchain.cutlass_version}
    moved = [f"{name} was {then[name]}, is {now}" for name, now in today.items() if then.get(name, now) != now]
    return ", ".join(moved) or "kernel sources changed"


# --- on this GPU ---


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a record when it was run again."""

    record: TuningRecord
    outcome: Literal["right", "failed", "unusable"]
    """Unusable: this version would not choose it, so it was not run."""
    detail: str = ""


class Runner(Protocol):
    """A GPU and how to run a winner on it; tests have one without a GPU."""

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
        from srelu24.dispatch import gpu_of
        from srelu24.worker import Worker

        device = torch.device("cuda", torch.cuda.current_device())
        self._target = gpu_of(device)
        self._worker = Worker(str(device), step_seconds=120)  # a step may compile, too

    @property
    def target(self) -> GpuTarget:
        return self._target

    def check(self, record: TuningRecord, config: KernelConfig) -> str:
        from srelu24.worker import Candidate, Failed, Job, Step

        # A job verifies before it times; one round is the least it can be asked for.
        kernel = Candidate(str(record), (Step(record.problem, config),))
        job = Job((kernel,), density=record.density, seconds=0.0, min_rounds=1, arch=record.arch)
        failures = [outcome.reason for outcome in self._worker.run(job) if isinstance(outcome, Failed)]
        return "; ".join(failures)

    def close(self) -> None:
        self._worker.close()
