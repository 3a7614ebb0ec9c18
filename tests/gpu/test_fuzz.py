"""A walk over the legal space at random, in a child process with deadlines: no kernel hangs, crashes or is wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from srelu24.tuning.worker import Candidate, Failed, Job, Step, Timed, Worker
from srelu24_gen import space
from srelu24_gen.spec import (
    PRUNED_ACTIVATIONS,
    WIDE_TYPES,
    Activation,
    Family,
    KernelConfig,
    KernelSpec,
    Op,
    Problem,
    Producer,
)
from srelu24_gen.target import TARGETS

TARGET = TARGETS["h200"]
CANDIDATES, PER_JOB = 120, 20
DEADLINE_S = 20.0
"""Of a candidate whose own work takes milliseconds."""


def draw_family(draw: random.Random) -> Family:
    while True:
        op = draw.choice([Op.GEMM, *PRUNED_ACTIVATIONS, Op.SPGEMM])
        flags = (draw.random() < 0.3, draw.random() < 0.3, draw.random() < 0.3)
        family = Family(op, draw.choice(WIDE_TYPES), draw.choice(list(Activation)), *flags)
        if space.supports_family(family).ok:
            return family


def draw_config(draw: random.Random) -> KernelConfig:
    tile_m, tile_n = draw.choice(space.tiles(TARGET))
    return KernelConfig(
        tile_m=tile_m,
        tile_n=tile_n,
        cluster_m=draw.choice((1, 2)),
        stages=draw.randint(2, 8),
        producer=draw.choice(list(Producer)),
        stream_k=draw.random() < 0.6,
        raster_group=draw.randint(1, 20),
    )


def draw_step(draw: random.Random) -> Step:
    """Sizes of all kinds: single rows, K of one k-block, pieces of stream-K shorter than the ring, many tiles."""
    while True:
        m = draw.choice((1, draw.randint(2, 64), draw.randint(65, 500), draw.randint(501, 6000)))
        n = 8 * draw.choice((draw.randint(1, 16), draw.randint(17, 100), 32 * draw.randint(1, 16)))
        k = 8 * draw.choice((draw.randint(1, 8), draw.randint(9, 64), draw.randint(65, 400)))
        step = Step(Problem(draw_family(draw), m, n, k), draw_config(draw))
        if space.supports(step.problem, step.config, TARGET).ok:
            return step


def draw_steps() -> list[Step]:
    draw = random.Random(2403)
    return [draw_step(draw) for _ in range(CANDIDATES)]


STEPS = draw_steps()
SPECS = list(dict.fromkeys(KernelSpec(step.problem.family, step.config.compiled()) for step in STEPS))


@pytest.fixture(scope="module")
def worker(device: torch.device) -> Iterator[Worker]:
    with Worker(str(device), step_seconds=DEADLINE_S) as running:
        yield running


@pytest.mark.parametrize("first", range(0, CANDIDATES, PER_JOB))
def test_no_legal_kernel_hangs_crashes_or_is_wrong(first: int, worker: Worker) -> None:
    steps = STEPS[first : first + PER_JOB]
    candidates = tuple(Candidate(f"{first + i}: {step.problem} {step.config}", (step,)) for i, step in enumerate(steps))
    outcomes = list(worker.run(Job(candidates, density=0.3, seconds=0.0, min_rounds=2)))
    assert [f"{o.name}: {o.reason}" for o in outcomes if isinstance(o, Failed)] == []
    assert {o.name for o in outcomes if isinstance(o, Timed)} == {c.name for c in candidates}
