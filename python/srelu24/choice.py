"""Which configuration answers a problem: a tuning record's, or what the cost model ranks first. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from srelu24.db import Database, Match
from srelu24.records import TuningRecord
from srelu24_gen import cost
from srelu24_gen.spec import KernelConfig, Problem
from srelu24_gen.target import GpuTarget

MISFIT = 1.05
"""A record of another problem does not count where the cost model expects its own first choice to be so many times
faster: where a tile fits those rows and not these. What the model is wrong by is less (docs/tuning.md)."""
_HOW = {
    "exact": "tuned for this very problem on this GPU",
    "nearest": "tuned on this GPU for the nearest known problem",
    "other_gpu": "tuned on another GPU of this architecture",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration for a problem, and where it comes from.

    Attributes:
        source: "exact", "nearest", "other_gpu" (from ``record``) or "default" (no record helps).
        why: one phrase for people.
    """

    config: KernelConfig
    source: str
    record: TuningRecord | None
    why: str


def answer(problem: Problem, target: GpuTarget, db: Database) -> Choice:
    """The database's answer, else :func:`srelu24_gen.cost.best`, where there is none or a neighbour's does not fit
    (:data:`MISFIT`).

    Raises:
        Unsupported: no kernel computes the problem on ``target``; the message is the reason.
    """
    match = db.find(problem, target)
    if match is None:
        default = cost.best(problem, target)
        return Choice(default, "default", None, "default for this size, untuned: no record helps")
    if match.how == "exact":
        return Choice(match.config, match.how, match.record, _HOW[match.how])
    if (gain := _misfit(problem, match, target)) >= MISFIT:
        why = f"default for this size, untuned: expected at {gain:.2f}x of what is tuned for {match.record.problem}"
        return Choice(cost.best(problem, target), "default", None, why)
    return Choice(match.config, match.how, match.record, f"{_HOW[match.how]} ({match.record.problem})")


def _misfit(problem: Problem, match: Match, target: GpuTarget) -> float:
    """How many times faster than a neighbour's configuration the cost model expects its own first choice to be here,
    beyond what it expects, wrongly, where that configuration was measured to be the best. 1 where it says nothing."""
    if not cost.speaks_for(problem, target):
        return 1.0

    def expected(at: Problem) -> float:
        return cost.cost(at, match.config, target).us / cost.cost(at, cost.best(at, target), target).us

    here = dataclasses.replace(problem, m=cost.rounded(problem.m))
    return expected(here) / expected(dataclasses.replace(match.record.problem, family=problem.family))
