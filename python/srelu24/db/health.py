"""What tuning records are still worth: against other records, against today's kernels, and run on this GPU.

Nothing here changes the database. torch is imported only where kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from srelu24.db.records import Trial, TuningRecord
from srelu24_gen import compile as compiler
from srelu24_gen.errors import RenderError, Unsupported
from srelu24_gen.spec import Family, KernelConfig, KernelSpec
from srelu24_gen.target import Toolchain

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
