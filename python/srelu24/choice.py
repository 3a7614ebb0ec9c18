"""Which configuration answers a problem: a tuning record's, or what the cost model ranks first. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from srelu24.db import Database
from srelu24.records import TuningRecord
from srelu24_gen import cost
from srelu24_gen.spec import KernelConfig, Problem
from srelu24_gen.target import GpuTarget

DOUBT = 1.02
"""A neighbour's configuration gives way to the cost model's first choice if that is expected to be faster. Where the
model would have chosen another one for the neighbour, too, it is wrong by at least what it expected of it there, and
has to expect this much beyond that (docs/tuning.md)."""
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
    """The database's answer; for a neighbour's :func:`srelu24_gen.cost.best` where that is expected to be faster
    (:data:`DOUBT`), and without an answer, too.

    Raises:
        Unsupported: no kernel computes the problem on ``target``; the message is the reason.
    """
    match = db.find(problem, target)
    if match is None:
        default = cost.best(problem, target)
        return Choice(default, "default", None, "default for this size, untuned: no record helps")
    if match.how == "exact":
        return Choice(match.config, match.how, match.record, _HOW[match.how])
    near = match.record.problem
    neighbours = Choice(match.config, match.how, match.record, f"{_HOW[match.how]} ({near})")
    if not cost.speaks_for(problem, target):
        return neighbours
    wrongly = _gain(dataclasses.replace(near, family=problem.family), match.config, target)
    gain = _gain(problem, match.config, target) / wrongly
    if gain <= (DOUBT if wrongly > 1 else 1):
        return neighbours
    why = f"default for this size, untuned: expected at {gain:.3f}x of what is tuned for {near}"
    return Choice(cost.best(problem, target), "default", None, why)


def _gain(problem: Problem, config: KernelConfig, target: GpuTarget) -> float:
    """How many times as fast as ``config`` the cost model expects its first choice to be; 1 for that choice itself."""
    problem = dataclasses.replace(problem, m=cost.rounded(problem.m))
    first = cost.cost(problem, cost.best(problem, target), target)
    return max(1.0, cost.cost(problem, config, target).us / first.us)
