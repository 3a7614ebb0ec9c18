"""Which configuration answers a problem: a tuning record's, or what the cost model ranks first. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from srelu24.db.database import Database
from srelu24.db.records import TuningRecord
from srelu24_gen import cost, space
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, KernelConfig, Problem, instructions_of
from srelu24_gen.target import GpuTarget

DOUBT = 1.02
"""A neighbour's configuration gives way to the cost model's first choice if that is expected to be faster. Where the
model would have chosen another one for the neighbour, too, it is wrong by at least what it expected of it there, and
has to expect this much beyond that (docs/tuning.md)."""
SPARSE = "sparse"
"""The way of an FFN that prunes; the others are :data:`srelu24.runtime.dense.WAYS`."""
MARGIN = 1.02
"""The sparse pair runs where it was measured to be so many times faster than the best dense FFN of the same sizes."""
PREDICTED_MARGIN = 1.1
"""The same where only :func:`srelu24_gen.cost.ffn_gain` says so: dense unless the model leaves no doubt."""
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


@dataclass(frozen=True, slots=True)
class FfnChoice:
    """Sparse or dense, for an FFN.

    Attributes:
        way: :data:`SPARSE` or one of :data:`srelu24.runtime.dense.WAYS`.
        dense_way: what runs where dense is asked for.
        gain: how many times faster the sparse pair is than ``dense_way``, as far as known; 1 where it is not.
        source: "measured" at this very M, "between" two measured M, "scaled" from one by the cost model, "model", or
            "unknown" where no time and no model says anything.
        why: one phrase for people.
    """

    way: str
    dense_way: str
    gain: float
    source: Literal["measured", "between", "scaled", "model", "unknown"]
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


def answer_ffn(
    shape: Shape,
    dtype: DType,
    b1: bool,
    b2: bool,
    target: GpuTarget,
    db: Database,
    activation: Activation = Activation.RELU2,
) -> FfnChoice:
    """Whether the FFN runs sparse or dense, by the times that the tuner stored for D and F on this GPU.

    At an M that was measured, those times decide. Between two, the gain is interpolated in log M; above the largest it
    stays, below the smallest it shrinks as the cost model says. Without a time for D and F the cost model decides,
    where it is fitted to the kernels; else it is dense, so that nobody is slower for not having tuned.

    Raises:
        Unsupported: no kernel computes the sparse pair on ``target``; the message is the reason.
    """
    first, second = shape.gemms(dtype, b1, b2, activation)
    for problem in (first, second):
        space.default(problem, target)
    points = []
    for record in db.of_widths(first, target):
        if best := record.evidence.best_dense:
            points.append((max(record.m, 1), *best))
    if not points and instructions_of(target.arch) is not cost.FITTED:
        why = (
            f"default, untuned: no time of this D and F on this GPU; srelu24 tune --shape {shape} finds what is faster"
        )
        return FfnChoice("cublas", "cublas", 1.0, "unknown", why)
    if not points:
        gain = cost.ffn_gain(shape, dtype, target)
        return _ffn_choice("cublas", gain, "model", "nothing measured for this D and F; the cost model expects")
    m = max(shape.m, 1)
    low = max((p for p in points if p[0] <= m), default=None)
    high = min((p for p in points if p[0] >= m), default=None)
    if low and high and low[0] < high[0]:
        share = math.log(m / low[0]) / math.log(high[0] / low[0])
        gain = low[2].speedup ** (1 - share) * high[2].speedup ** share
        way = (low if share < 0.5 else high)[1]
        return _ffn_choice(way, gain, "between", f"between the times at {low[0]} and {high[0]} tokens:")
    at, way, time = low or high or points[0]
    if at == m:
        return _ffn_choice(way, time.speedup, "measured", "measured:")
    gain = time.speedup
    if at > m:
        here, there = (cost.ffn_gain(Shape(tokens, shape.d, shape.f), dtype, target) for tokens in (m, at))
        gain *= min(1.0, here / there)
    return _ffn_choice(way, gain, "scaled", f"scaled from the time at {at} tokens:")


def _ffn_choice(
    dense_way: str, gain: float, source: Literal["measured", "between", "scaled", "model"], how: str
) -> FfnChoice:
    needed = PREDICTED_MARGIN if source == "model" else MARGIN
    way = SPARSE if gain >= needed else dense_way
    why = f"{how} the sparse pair at {gain:.3f}x of dense {dense_way}'s speed, {needed:g}x is needed"
    return FfnChoice(way, dense_way, gain, source, why)
