"""A GPU and compiler that make times up, for tests of the tuner."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from srelu24.db.database import Database
from srelu24.tuning import noise
from srelu24.tuning.shortlist import shortlist
from srelu24.tuning.worker import (
    Failed,
    Job,
    Outcome,
    Progressed,
    Step,
    Timed,
)
from srelu24_gen import space
from srelu24_gen.cost import best
from srelu24_gen.errors import CompileError, Srelu24Error
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import TARGETS

H200 = TARGETS["h200"]
M, D, F = 4096, 2048, 8192
GEMM1 = Problem(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), M, F, D)
GEMM2 = Problem(Family(Op.SPGEMM, DType.BF16), M, D, F)
DEFAULTS = (best(GEMM1, H200), best(GEMM2, H200))
OTHERS = tuple([c for c in space.candidates(p, H200) if c != d] for p, d in zip((GEMM1, GEMM2), DEFAULTS, strict=True))
NEXT = shortlist(GEMM1, H200, Database.open(Path("/nonexistent"), Path("/nonexistent/tuning.sqlite")), 8).first[0]
"""The first of GEMM1 to be tried after the default."""
GOOD = tuple(max(o, key=functools.partial(noise.changes, d)) for o, d in zip(OTHERS, DEFAULTS, strict=True))
"""As unlike the default as can be: another binary, and another raster."""


class FakeGpu:
    """A :class:`srelu24.tuning.search.Runner` that makes times up; every job and build passes its simulated seconds."""

    def __init__(
        self,
        cost: Callable[[Problem, KernelConfig], float] = lambda problem, config: 1.0,
        *,
        pair_cost: Callable[[tuple[Step, ...]], float] | None = None,
        sigma: float = 0.01,
        drift: float = 0.1,
        broken: Sequence[KernelConfig] = (),
        build_seconds: float = 0.01,
        overhead: float = 0.5,
        version: str = "v1",
        seed: int = 0,
    ) -> None:
        self.target = H200
        self.cost, self.pair_cost, self.sigma, self.drift = cost, pair_cost, sigma, drift
        self.broken, self.build_seconds, self.overhead, self.version = broken, build_seconds, overhead, version
        self.unbuildable: Sequence[KernelConfig] = ()
        self.wrong_at_full_size: Sequence[KernelConfig] = ()
        self.hanging: Sequence[Problem] = ()
        self.throttled = False
        self.cublas = 1.5
        self.interrupt_after: int | None = None
        self.random = random.Random(seed)
        self.clock = 0.0
        self.jobs: list[Job] = []
        self.closed = self.started = False

    def start(self) -> None:
        if not self.started:  # as long as a child takes
            self.clock += 5.0
        self.started = True

    def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
        for spec in specs:
            self.clock += self.build_seconds
            yield spec, CompileError("no such register") if spec.config in self.unbuildable else self.key(spec)

    def key(self, spec: KernelSpec) -> str:
        return f"{self.version}-{spec.digest}"

    def run(self, job: Job) -> Iterator[Outcome]:
        if self.interrupt_after is not None and len(self.jobs) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.jobs.append(job)
        self.clock += job.seconds + self.overhead
        alive = []
        for candidate in job.candidates:
            hangs = [s for s in candidate.steps if s.config in self.broken or (s.config and s.problem in self.hanging)]
            if hangs:
                yield Failed(candidate.name, "no answer within 30 s; the kernel hangs")
            elif job.check == "whole" and any(step.config in self.wrong_at_full_size for step in candidate.steps):
                yield Failed(candidate.name, "wrong result: output: 1 wrong")
            else:
                alive.append(candidate)
        rounds = max(job.min_rounds, int(job.seconds / (0.025 * max(len(alive), 1))))
        samples: dict[str, list[float]] = {c.name: [] for c in alive}
        clock = 1.0
        for _ in range(rounds):
            clock *= 1 + self.random.gauss(0, self.drift)  # all candidates of a round share the GPU's mood
            for candidate in alive:
                ms = sum(self.cost(s.problem, s.config) if s.config else self.cublas for s in candidate.steps)
                if self.pair_cost and candidate.steps[0].problem == GEMM1 and len(candidate.steps) == 2:
                    ms = self.pair_cost(candidate.steps)
                samples[candidate.name].append(ms * clock * (1 + self.random.gauss(0, self.sigma)))
        yield Progressed(1.0)
        for name, taken in samples.items():
            yield Timed(
                name, sorted(taken)[len(taken) // 2], taken, sm_mhz=1500.0, watts=690.0, throttled=self.throttled
            )

    def versions(self) -> dict[str, str]:
        return {"driver": "580.1"}

    def now(self) -> float:
        return self.clock

    def close(self) -> None:
        self.closed = True

    def timed(self, stage_rounds: int) -> set[tuple[Problem, KernelConfig]]:
        """What ran in jobs of so many rounds at least: 5 is a screening."""
        return {
            (step.problem, step.config)
            for job in self.jobs
            if job.min_rounds == stage_rounds
            for candidate in job.candidates
            for step in candidate.steps
        }


def better(*configs: KernelConfig, factor: float = 0.95) -> Callable[[Problem, KernelConfig], float]:
    return lambda problem, config: factor if config in configs else 1.0
