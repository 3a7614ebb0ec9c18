"""Is it really faster? Decisions under noise."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_gpu import DEFAULTS, OTHERS
from srelu24.tuning import noise
from srelu24.tuning.noise import choose_chain, speedup


def paired(rng: random.Random, rounds: int, factors: Sequence[float], sigma: float = 0.02) -> list[list[float]]:
    mood = [1 + rng.gauss(0, 0.2) ** 2 for _ in range(rounds)]
    return [[f * x * (1 + rng.gauss(0, sigma)) for x in mood] for f in factors]


def test_equal_candidates_are_hardly_ever_told_apart() -> None:
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        times = paired(rng, 30, [1.0] * 9)
        pairs = [(DEFAULTS[0], c) for c in [DEFAULTS[1], *OTHERS[1][:8]]]
        wrong += choose_chain(dict(zip(pairs, times, strict=True)), pairs[0])[0] != pairs[0]
    assert wrong <= 6  # 1 % of 300 is 3


def test_a_clear_gain_is_seen_in_spite_of_drift() -> None:
    rng = random.Random(0)
    seen = 0
    for _ in range(50):
        default, good = paired(rng, 40, [1.0, 0.97])
        found = speedup(default, good)
        seen += found.low > 1
        assert found.low <= found.median <= found.high
        assert found.median == pytest.approx(1 / 0.97, abs=0.015)
    assert seen >= 48


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median_and_turns_around(samples: list[float]) -> None:
    ones = [1.0] * len(samples)
    forth, back = speedup(samples, ones), speedup(ones, samples)
    assert forth.low <= forth.median <= forth.high
    if forth.low > 0:
        assert back.high == pytest.approx(1 / forth.low)
    if len(samples) < 5:
        assert forth.low == 0, "so few rounds prove nothing"


def test_a_tiny_gain_is_not_worth_a_change() -> None:
    pair = (DEFAULTS[0], OTHERS[1][0])
    tiny = 1 / (1 + (noise.MIN_GAIN - 1) / 2)
    assert choose_chain({DEFAULTS: [1.0] * 40, pair: [tiny] * 40}, DEFAULTS)[0] == DEFAULTS


def test_of_equals_the_one_nearest_to_the_default_is_kept() -> None:
    rng = random.Random(1)
    near = (DEFAULTS[0], dataclasses.replace(DEFAULTS[1], raster_group=4))
    far = (dataclasses.replace(DEFAULTS[0], raster_group=4, stages=3), near[1])
    default, a, b, c = paired(rng, 40, [1.0, 0.94, 0.9399, 0.8])
    assert choose_chain({DEFAULTS: default, far: b, near: a}, DEFAULTS)[0] == near
    assert choose_chain({DEFAULTS: default, far: c, near: a}, DEFAULTS)[0] == far
