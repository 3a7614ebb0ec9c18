"""What a search writes down: every trial with its reason, and the record of a winner with its evidence."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from srelu24.db.database import Database
from srelu24.db.records import ChainStep, DenseTime, Evidence, Trial, TuningRecord
from srelu24.db.store import now
from srelu24.tuning.events import Stage
from srelu24.tuning.noise import speedup
from srelu24.tuning.worker import Step, Timed
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import KernelConfig, Problem
from srelu24_gen.target import GpuTarget


@dataclass(frozen=True, slots=True)
class Refined:
    """A configuration's last times and the default's in the same rounds."""

    timed: Timed
    default: Timed
    speedup: float


@dataclass(frozen=True, slots=True)
class ChainTimes:
    """The chosen configurations, the defaults and the dense FFNs, of the same rounds."""

    best: Timed
    default: Timed
    dense: Mapping[str, Timed]


@dataclass
class Journal:
    """Rows of one search, on their way to the database."""

    db: Database
    target: GpuTarget
    density: float
    budget_s: float
    digests: dict[tuple[Problem, KernelConfig], str] = field(default_factory=dict)
    """Key of the binary of every configuration that was built."""

    def trials(self, stage: Stage, results: Mapping[tuple[Step, ...], tuple[Timed, float]]) -> None:
        """Write down times and speed-ups over the default; they are on disk when this returns."""
        self.db.add_trial(*(self._trial(stage, steps, timed, ratio) for steps, (timed, ratio) in results.items()))

    def failure(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        """Write down a candidate that has no time."""
        self.db.add_trial(self._trial(stage, steps, reason=reason))

    def screened(self, problem: Problem) -> dict[tuple[KernelConfig, str], Trial]:
        """The last screening of each configuration and binary at this density, by this search or an earlier one."""
        found = {}
        for trial in self.db.trials(problem, self.target):
            with contextlib.suppress(Unsupported):
                if trial.stage == "screen" and trial.density == self.density and trial.source_digest:
                    found[trial.kernel_config(), trial.source_digest] = trial
        return found

    def record(
        self, problem: Problem, config: KernelConfig, alone: Refined, chain: ChainTimes, versions: dict[str, str]
    ) -> TuningRecord:
        """The record of one GEMM's winner, with the times of the whole chain and of the dense FFNs beside it."""
        samples = alone.timed.samples
        timed = (alone.timed, chain.best, chain.default, *chain.dense.values())
        evidence = Evidence(
            ms=alone.timed.ms,
            default_ms=alone.default.ms,
            pair_ms=chain.best.ms,
            pair_default_ms=chain.default.ms,
            dense={way: _dense_time(dense, chain.best, len(chain.dense)) for way, dense in chain.dense.items()},
            samples=len(samples),
            spread=_spread(samples),
            outliers=_outliers(samples),
            throttled=any(t.throttled for t in timed),
            sm_mhz=alone.timed.sm_mhz,
            watts=alone.timed.watts,
            budget_s=self.budget_s,
            versions=versions,
            source_digest=self.digests[problem, config],
            when=now(),
        )
        return TuningRecord(**self._key_fields(problem), config=config.to_dict(), evidence=evidence)

    def _trial(
        self,
        stage: Stage,
        steps: tuple[Step, ...],
        timed: Timed | None = None,
        ratio: float | None = None,
        reason: str = "",
    ) -> Trial:
        then = None
        for step in reversed(steps[1:]):
            p = step.problem
            then = ChainStep(p.family, p.m, p.n, p.k, _config_fields(step), then)
        return Trial(
            **self._key_fields(steps[0].problem),
            config=_config_fields(steps[0]),
            stage=stage,
            outcome="ok" if timed else "failed",
            reason=reason,
            ms=timed.ms if timed else None,
            speedup=ratio,
            samples=len(timed.samples) if timed else 0,
            throttled=bool(timed and timed.throttled),
            sm_mhz=timed.sm_mhz if timed else None,
            watts=timed.watts if timed else None,
            source_digest="+".join(self.digests.get((s.problem, s.config), "") if s.config else "" for s in steps),
            when=now(),
            then=then,
        )

    def _key_fields(self, problem: Problem) -> dict[str, Any]:
        return {
            "family": problem.family,
            "m": problem.m,
            "n": problem.n,
            "k": problem.k,
            "arch": self.target.arch,
            "gpu": self.target.key,
            "density": self.density,
        }


def _config_fields(step: Step) -> dict[str, Any]:
    return step.config.to_dict() if step.config else {}


def _dense_time(dense: Timed, chain: Timed, comparisons: int) -> DenseTime:
    gain = speedup(dense.samples, chain.samples, comparisons)
    return DenseTime(ms=dense.ms, speedup=gain.median, low=gain.low)


def _spread(samples: list[float]) -> float | None:
    if len(samples) < 4:
        return None
    low, _, high = quantiles(samples, n=4)
    return (high - low) / median(samples)


def _outliers(samples: list[float]) -> int:
    if len(samples) < 4:
        return 0
    low, _, high = quantiles(samples, n=4)
    reach = 3 * (high - low)
    return sum(not low - reach <= sample <= high + reach for sample in samples)
