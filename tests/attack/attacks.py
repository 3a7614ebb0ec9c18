"""Attacks: each draws tries from a seeded generator for its share of the time, and counts what came of them.

All together take SRELU24_ATTACK_SECONDS, by default less than two minutes; `make attack` runs them for longer. A try
that fails prints its number: SRELU24_ATTACK_FIRST begins there.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

SECONDS = float(os.environ.get("SRELU24_ATTACK_SECONDS", "90"))
FIRST = int(os.environ.get("SRELU24_ATTACK_FIRST", "0"))
COUNTS: dict[str, Counter[str]] = {}


class Attack:
    """The tries of one attack."""

    def __init__(self, name: str, share: float, least: int = 1) -> None:
        self.counts = COUNTS.setdefault(name, Counter())
        self.ends = time.monotonic() + SECONDS * share
        self.least = least

    def __iter__(self) -> Iterator[random.Random]:
        """A generator for each try, until the time is used up, but at least so many."""
        number = FIRST
        while time.monotonic() < self.ends or number < FIRST + self.least:
            self.counts["tries"] += 1
            try:
                yield random.Random(number)
            except GeneratorExit:  # the body failed
                print(f"try {number} failed; SRELU24_ATTACK_FIRST={number} begins with it")
                raise
            number += 1
