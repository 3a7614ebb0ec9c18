"""Which configuration answers a problem: a tuning record's, or what the cost model ranks first. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from srelu24.db import Database, Match
from srelu24.records import TuningRecord
from srelu24_gen import cost
from srelu24_gen.spec import KernelConfig, Problem
from srelu24_gen.target import GpuTarget

REFIT, MISFIT = 1.02, 1.05
"""What a record of another number of tokens says of the tile is believed, unless the cost model expects another one to
be :data:`MISFIT` times as fast: where a tile fits those rows and not these. All else of its configuration goes with
the rows, and is believed unless the model, surer between equal tiles, expects :data:`REFIT` (docs/tuning.md)."""
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
    """The database's answer; of a neighbour only what fits (:data:`REFIT`, :data:`MISFIT`). Without an answer,
    :func:`srelu24_gen.cost.best`.

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
    config, gain = _fitted(problem, match, target)
    if config == match.config:
        return Choice(config, match.how, match.record, f"{_HOW[match.how]} ({near})")
    expected = f"expected at {gain:.2f}x of what is tuned for {near}"
    if _tile(config) == _tile(match.config):
        return Choice(config, match.how, match.record, f"{_HOW[match.how]}, but for what suits these rows: {expected}")
    return Choice(config, "default", None, f"default for this size, untuned: {expected}")


def _fitted(problem: Problem, match: Match, target: GpuTarget) -> tuple[KernelConfig, float]:
    """A neighbour's configuration, that of its tile or that of any which the cost model ranks first here, and how many
    times as fast as the neighbour's it is expected to be: beyond what the model expects, wrongly, where that was
    measured to be the best. The neighbour's own where the model says nothing."""
    if not cost.speaks_for(problem, target):
        return match.config, 1.0
    here = dataclasses.replace(problem, m=cost.rounded(problem.m))
    there = dataclasses.replace(match.record.problem, family=problem.family)

    def first(at: Problem, tile: tuple[int, ...] | None) -> tuple[KernelConfig, float]:
        """The first of a tile or of all, and how many times as fast as the neighbour's it is expected to be."""
        config = next(c for c in (*cost.rank(at, target), match.config) if tile in (None, _tile(c)))
        return config, cost.cost(at, match.config, target).us / cost.cost(at, config, target).us

    found = match.config, 1.0
    for tile, needed in ((_tile(match.config), REFIT), (None, MISFIT)):
        config, gain = first(here, tile)
        gain /= max(1.0, first(there, tile)[1])
        if gain >= needed * found[1]:
            found = config, gain
    return found


def _tile(config: KernelConfig) -> tuple[int, int, int]:
    return config.tile_m, config.tile_n, config.tile_k
