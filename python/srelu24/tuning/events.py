"""What the tuner reports: events while it searches, and a report at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srelu24.db.records import TuningRecord
from srelu24_gen.models import Pass, Shape

Stage = Literal["screen", "refine", "pair"]


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage of the search begins: ``what`` is a problem or all problems of a chain, ``total`` counts candidates."""

    stage: Stage
    what: str
    total: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """``done`` of ``total`` candidates (a fraction while they are timed together); ``best`` so far over the default."""

    stage: Stage
    what: str
    done: float
    total: int
    best: str
    speedup: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A candidate that could not be built, hung, crashed or was wrong."""

    stage: Stage
    what: str
    config: str
    reason: str


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What a search found."""

    records: list[TuningRecord]
    """The winners of the pass's GEMMs, as stored; with ``dense``, those of the dense GEMMs follow."""
    pair_ms: float
    """All winners chained, milliseconds."""
    pair_default_ms: float
    """All defaults chained, in the same rounds."""
    speedup: float
    """Defaults over winners, median of paired rounds; 1 where the defaults are kept."""
    kept_default: bool
    tried: int
    """Candidates timed in this run, all stages."""
    resumed: int
    """Candidates taken over from an earlier run."""
    skipped: int
    """Candidates left out because the time was up."""
    failures: list[Failure]
    pruned: list[Failure]
    """Configurations that cannot work for these sizes on this GPU, with the reason."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The search is over."""

    report: TuneReport


@dataclass(frozen=True, slots=True)
class ShapeStarted:
    """A pass of one of many shapes: the ``number``-th of ``total`` on this GPU model, with so many seconds to search.

    ``left_s`` is about how long this one and the others will take.
    """

    shape: Shape
    which: Pass
    gpu: str
    seconds: float
    number: int
    total: int
    left_s: float


@dataclass(frozen=True, slots=True)
class ShapeEnded:
    """A pass of a shape is done: with a report, with an error, or with neither where it had been tuned before."""

    shape: Shape
    which: Pass
    gpu: str
    report: TuneReport | None
    error: str


class Stopped(Exception):
    """A search ends because the others do; what it measured is stored."""


Event = StageStarted | Advanced | Failure | Finished | ShapeStarted | ShapeEnded
