"""Is one configuration really faster than another? Decisions from paired samples of interleaved rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from srelu24_gen.spec import KernelConfig

MIN_GAIN = 1.002
"""A smaller gain over the default is not worth another configuration, however certain it is."""
TIE = 1.01
"""A simpler pair may be so much slower than the fastest and still be kept, where noise hides the difference."""
CONFIDENCE = 0.99
"""That a winner is faster than the default at all, over all pairs together."""

Pair = tuple[KernelConfig, KernelConfig]
"""Configurations of two chained GEMMs."""


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster than a baseline: median of paired ratios and its confidence interval."""

    low: float
    median: float
    high: float


def speedup(baseline: Sequence[float], samples: Sequence[float], comparisons: int = 1) -> Speedup:
    """Baseline over samples, both of the same rounds.

    The interval is that of the sign test: order statistics of the ratios, whatever their distribution, at
    :data:`CONFIDENCE` over so many comparisons made at once. Too few rounds give (0, median, inf).
    """
    ratios = sorted(b / s for b, s in zip(baseline, samples, strict=True))
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * comparisons))
    outside = math.floor((len(ratios) - z * math.sqrt(len(ratios))) / 2) - 1
    if outside < 0:
        return Speedup(0.0, median(ratios), math.inf)
    return Speedup(ratios[outside], median(ratios), ratios[-1 - outside])


def choose_pair(times: dict[Pair, list[float]], default: Pair) -> tuple[Pair, Speedup]:
    """The pair to keep, from samples of the same rounds, and its speed-up over the default.

    The default, unless the fastest beats it beyond noise and by :data:`MIN_GAIN`; of those that cannot be told from
    the fastest, are within :data:`TIE` of it and beat the default too, the one most like the default.
    """
    over_default = {pair: speedup(times[default], samples, len(times)) for pair, samples in times.items()}
    better = [p for p, s in over_default.items() if p != default and s.low > 1 and s.median >= MIN_GAIN]
    if not better:
        return default, Speedup(1.0, 1.0, 1.0)
    fastest = max(better, key=lambda p: over_default[p].median)
    behind = {p: speedup(times[p], times[fastest], len(times)) for p in better}
    as_fast = [p for p, by in behind.items() if p == fastest or (by.low <= 1 and by.median <= TIE)]
    chosen = min(as_fast, key=lambda p: (sum(map(changes, p, default)), -over_default[p].median))
    return chosen, over_default[chosen]


def changes(config: KernelConfig, other: KernelConfig) -> int:
    """Fields in which two configurations differ."""
    a, b = config.to_dict(), other.to_dict()
    return sum(a[name] != b[name] for name in a)
