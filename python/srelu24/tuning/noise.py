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
"""A simpler chain may be so much slower than the fastest and still be kept, where noise hides the difference."""
CONFIDENCE = 0.99
"""Probability that a winner is faster than the default at all, over all chains together."""

Chain = tuple[KernelConfig, ...]
"""Configurations of GEMMs that run one after another."""


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


def choose_chain(times: dict[Chain, list[float]], default: Chain) -> tuple[Chain, Speedup]:
    """The chain to keep, from samples of the same rounds, and its speed-up over the default.

    It is the default, unless the fastest chain beats it beyond noise and by :data:`MIN_GAIN`. Several chains may beat
    it and be within :data:`TIE` of the fastest, with a difference that may be noise: of those it is the one most like
    the default.
    """
    over_default = {chain: speedup(times[default], samples, len(times)) for chain, samples in times.items()}
    better = [c for c, s in over_default.items() if c != default and s.low > 1 and s.median >= MIN_GAIN]
    if not better:
        return default, Speedup(1.0, 1.0, 1.0)
    fastest = max(better, key=lambda c: over_default[c].median)
    behind = {c: speedup(times[c], times[fastest], len(times)) for c in better}
    as_fast = [c for c, by in behind.items() if c == fastest or (by.low <= 1 and by.median <= TIE)]
    chosen = min(as_fast, key=lambda c: (sum(map(changes, c, default)), -over_default[c].median))
    return chosen, over_default[chosen]


def changes(config: KernelConfig, other: KernelConfig) -> int:
    """Fields in which two configurations differ."""
    a, b = config.to_dict(), other.to_dict()
    return sum(a[name] != b[name] for name in a)
