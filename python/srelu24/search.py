"""The search for the fastest pair of configurations for two chained GEMMs, on any :class:`Runner`.

Three stages, each timed in interleaved rounds against the default configuration:

1. *screen*: every candidate for a moment, as soon as it is compiled;
2. *refine*: the best third again for longer, halved until few are left;
3. *pair*: the best of the first GEMM with the best of the second, chained, because the two share one power budget.

A pair replaces the default only if it is faster beyond the noise of its own rounds. What is compared and stored is the
ratio to the default, not the time: the clock of a power-bound GPU drifts, and the ratio of paired samples does not.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from srelu24 import views
from srelu24.db import ChainStep, Database, Evidence, Trial, TuningRecord
from srelu24.noise import Pair, Speedup, changes, choose_pair, speedup
from srelu24.tune_events import Advanced, Event, Failure, Stage, StageStarted, TuneReport
from srelu24.user_store import now
from srelu24.worker import Candidate, Failed, Job, Outcome, Progressed, Step, Timed
from srelu24_gen import space
from srelu24_gen.errors import LaunchError, Srelu24Error, Unsupported
from srelu24_gen.spec import KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget

CHUNK = 8
"""Candidates screened in one interleaved run; few, so that the GPU starts before all is compiled."""
FINALISTS = 3
"""Configurations of each GEMM that meet in pairs, besides the default."""
MOST_PAIRS = 8
SCREEN_SHARE, REFINE_SHARE = 0.5, 0.25
"""Of the time budget; the pairs get the rest."""


class Runner(Protocol):
    """All that the search asks of a GPU and a compiler."""

    target: GpuTarget

    def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
        """Every spec once, as it is done, with the key of its binary or the error; closing the generator stops it."""

    def run(self, job: Job) -> Iterator[Outcome]:
        """As :meth:`srelu24.worker.Worker.run`."""

    def versions(self) -> dict[str, str]:
        """What a time depends on besides the kernel."""

    def now(self) -> float:
        """Seconds on a clock that does not jump."""

    def close(self) -> None:
        """Stop whatever still runs."""


@dataclass(frozen=True, slots=True)
class Refined:
    """A configuration's last times and the default's in the same rounds."""

    timed: Timed
    default: Timed
    dense: Timed | None
    speedup: float


@dataclass
class Search:
    """One chain of two GEMMs: the state of its search and its three stages."""

    chain: tuple[Problem, Problem]
    runner: Runner
    db: Database
    density: float
    budget_s: float
    resume: bool
    emit: Callable[[Event], None]
    dense: tuple[Step, ...] = ()
    """Dense GEMMs of the same sizes to time along with the two of the chain; or none."""

    def __post_init__(self) -> None:
        self.target = self.runner.target
        self.begin = self.runner.now()
        self.defaults = {p: space.default(p, self.target) for p in self.chain}
        self.nearest = {p: match.config for p in self.chain if (match := self.db.find(p, self.target))}
        self.failures: list[Failure] = []
        self.failed: set[tuple[Problem, KernelConfig]] = set()
        self.pruned: list[Failure] = []
        self.digests: dict[tuple[Problem, KernelConfig], str] = {}
        self.screened: dict[Problem, dict[KernelConfig, float]] = {p: {} for p in self.chain}
        self.refined: dict[Problem, dict[KernelConfig, Refined]] = {p: {} for p in self.chain}
        self.tried = self.resumed = self.skipped = 0

    def run(self) -> TuneReport:
        """All three stages; the winners' records are stored."""
        self.begin = self.runner.now()
        self._screen({p: self._candidates(p) for p in self.chain})
        for problem in self.chain:
            self._refine(problem)
        pair, gain, best, base, dense = self._pair()
        records = [
            self._record(problem, config, best, base, dense) for problem, config in zip(self.chain, pair, strict=True)
        ]
        for record in records:
            self.db.put(record)
        return TuneReport(
            records=records,
            pair_ms=best.ms,
            pair_default_ms=base.ms,
            speedup=gain.median,
            kept_default=pair == tuple(self.defaults.values()),
            tried=self.tried,
            resumed=self.resumed,
            skipped=self.skipped,
            failures=self.failures,
            pruned=self.pruned,
            seconds=self.runner.now() - self.begin,
        )

    # --- stages ---

    def _candidates(self, problem: Problem) -> list[KernelConfig]:
        """What to try: the default, what the nearest record says, then one per binary before its other variants, those
        most like the default first. The impossible goes to ``pruned``."""
        default = self.defaults[problem]
        usual = default.runtime_fields()
        ordered = sorted(
            space.candidates(problem, self.target),
            key=lambda c: (c.runtime_fields() != usual, changes(c, default)),
        )
        nearest = [self.nearest[problem]] if problem in self.nearest else []
        candidates = []
        for config in dict.fromkeys([default, *nearest, *ordered]):
            verdict = space.supports(problem, config, self.target)
            if verdict.ok:
                candidates.append(config)
            else:
                self._prune(problem, config, verdict.reason)
        return candidates

    def _screen(self, candidates: dict[Problem, list[KernelConfig]]) -> None:
        """Time what is compiled while the rest compiles: first every binary and what the nearest record says, which may
        be a variant of the default, then variants of the fastest."""
        deadline = self.begin + SCREEN_SHARE * self.budget_s
        # Six tenths for the rounds: the rest goes to verification, warm-up and waiting for the compiler.
        seconds_each = min(1.0, 0.6 * SCREEN_SHARE * self.budget_s / sum(map(len, candidates.values())))
        earlier = {p: self._earlier(p) if self.resume else {} for p in self.chain}
        binaries: dict[Problem, list[KernelConfig]] = {p: [] for p in self.chain}
        variants: dict[Problem, list[KernelConfig]] = {p: [] for p in self.chain}
        totals = {p: len(configs) - 1 for p, configs in candidates.items()}
        seen = dict.fromkeys(self.chain, 0)
        for problem, total in totals.items():
            self.emit(StageStarted("screen", str(problem), total))

        def screen(problem: Problem, waiting: list[KernelConfig]) -> None:
            steps = [(Step(problem, config),) for config in [self.defaults[problem], *waiting[:CHUNK]]]
            times = self._time("screen", steps, seconds_each * len(steps), 5)
            self.screened[problem] |= {step.config: ratio for (step,), (_, ratio) in times.items()}
            done(problem, len(waiting[:CHUNK]))
            del waiting[:CHUNK]

        def done(problem: Problem, count: int) -> None:
            seen[problem] += count
            self._advance("screen", problem, seen[problem], totals[problem])

        for problem, config, built in self._builds(candidates):
            default = self.defaults[problem]
            if isinstance(built, Srelu24Error):
                self._fail("screen", (Step(problem, config),), str(built))
                if config == default:
                    raise built
                done(problem, 1)
                continue
            known = {c.compiled() for p, c in self.digests if p == problem}
            self.digests[problem, config] = built
            if trial := earlier[problem].get((config, built)) if config != default else None:
                self._take_over(problem, config, trial)
                done(problem, 1)
            elif config != default:
                later = config.compiled() in known and config != self.nearest.get(problem)
                (variants if later else binaries)[problem].append(config)
            if all((p, self.defaults[p]) in self.digests for p in self.chain) and self.runner.now() >= deadline:
                break
            if len(binaries[problem]) >= CHUNK and (problem, default) in self.digests:
                screen(problem, binaries[problem])
        for waiting in (binaries, variants):
            for problem in self.chain:
                if waiting is variants:
                    done(problem, self._promising_first(problem, waiting[problem]))
            while self.runner.now() < deadline and any(waiting.values()):
                problem = max(self.chain, key=lambda p: len(waiting[p]))
                screen(problem, waiting[problem])
        self.skipped += sum(totals[p] - seen[p] for p in self.chain)

    def _builds(
        self, candidates: dict[Problem, list[KernelConfig]]
    ) -> Iterator[tuple[Problem, KernelConfig, str | Srelu24Error]]:
        """What :meth:`Runner.build` gives; both GEMMs are asked for in turn, so that neither waits for the other."""
        problems = {p.family: p for p in self.chain}
        each = ([KernelSpec(p.family, config, self.target.arch) for config in candidates[p]] for p in self.chain)
        specs = [spec for turn in itertools.zip_longest(*each) for spec in turn if spec is not None]
        with contextlib.closing(self.runner.build(specs)) as builds:
            for spec, built in builds:
                yield problems[spec.family], spec.config, built

    def _promising_first(self, problem: Problem, variants: list[KernelConfig]) -> int:
        """Sort variants by how fast their binary was; drop those of a binary that failed, and say how many."""
        fastest: dict[KernelConfig, float] = {}
        for config, ratio in self.screened[problem].items():
            fastest[config.compiled()] = max(ratio, fastest.get(config.compiled(), 0.0))
        failed = [c for c in variants if (problem, c.compiled()) in self.failed]
        for config in failed:
            variants.remove(config)
            self._prune(problem, config, "its binary failed with another raster group")
        variants.sort(key=lambda c: -fastest.get(c.compiled(), 0.0))
        return len(failed)

    def _prune(self, problem: Problem, config: KernelConfig, reason: str) -> None:
        text = views.config_text(problem.family.op, config)
        self.pruned.append(Failure("screen", str(problem), text, reason))

    def _refine(self, problem: Problem) -> None:
        """The best third, halved until the finalists are left; everything is timed again, next to the default."""
        default = self.defaults[problem]
        ranked = sorted((c for c in self.screened[problem] if c != default), key=self.screened[problem].__getitem__)
        keep = min(max(FINALISTS, math.ceil(len(ranked) / 3)), 8)
        survivors = ranked[::-1][:keep]
        rungs = 1 + max(0, math.ceil(math.log2(max(len(survivors), 1) / FINALISTS)))
        self.emit(StageStarted("refine", str(problem), rungs))
        end = self.begin + (SCREEN_SHARE + REFINE_SHARE) * self.budget_s
        problems_left = len(self.chain) - self.chain.index(problem)
        seconds = max((end - self.runner.now()) / problems_left, 0.05 * self.budget_s) / rungs
        dense = self.dense[self.chain.index(problem)] if self.dense else None
        for rung in range(rungs):
            steps = [(Step(problem, config),) for config in [default, *survivors]]
            reference = [(dense,)] if dense else []
            # Warm-up and verification come on top of the rounds.
            times = self._time("refine", [*steps, *reference], 0.7 * seconds, 8)
            beside = times.pop((dense,), None) if dense else None
            base = times[steps[0]][0]
            for (step,), (timed, ratio) in times.items():
                self.refined[problem][step.config] = Refined(timed, base, beside[0] if beside else None, ratio)
            survivors = [c for c in survivors if (Step(problem, c),) in times]
            survivors.sort(key=lambda c: -self.refined[problem][c].speedup)
            survivors = survivors[: max(FINALISTS, math.ceil(len(survivors) / 2))]
            self._advance("refine", problem, rung + 1, rungs)
        for config in set(self.refined[problem]) - {default, *survivors}:
            del self.refined[problem][config]

    def _pair(self) -> tuple[Pair, Speedup, Timed, Timed, Timed | None]:
        """The finalists chained: the chosen pair, its gain, and the times of it, the default and the dense chain."""
        first, second = self.chain
        default = (self.defaults[first], self.defaults[second])
        pairs = sorted(
            itertools.product(self.refined[first], self.refined[second]),
            key=lambda p: -self.refined[first][p[0]].speedup * self.refined[second][p[1]].speedup,
        )
        pairs = [default, *[pair for pair in pairs if pair != default][:MOST_PAIRS]]
        self.emit(StageStarted("pair", f"{first} + {second}", len(pairs)))
        left = self.begin + self.budget_s - self.runner.now()
        steps: dict[tuple[Step, ...], Pair] = {(Step(first, a), Step(second, b)): (a, b) for a, b in pairs}
        reference = [self.dense] if self.dense else []
        times = self._time("pair", [*steps, *reference], 0.8 * max(left, 0.1 * self.budget_s), 16)
        beside = times.pop(self.dense, None)
        timed = {steps[key]: result for key, (result, _) in times.items()}
        chosen, gain = choose_pair({pair: t.samples for pair, t in timed.items()}, default)
        return chosen, gain, timed[chosen], timed[default], beside[0] if beside else None

    # --- what the stages share ---

    def _time(
        self, stage: Stage, candidates: Sequence[tuple[Step, ...]], seconds: float, min_rounds: int
    ) -> dict[tuple[Step, ...], tuple[Timed, float]]:
        """Times and speed-ups over the first candidate, the default; every result becomes a trial at once."""
        # Numbers, not words: two configurations may read the same.
        named = {str(number): steps for number, steps in enumerate(candidates)}
        default = next(iter(named))
        what = " + ".join(str(step.problem) for step in named[default])
        job = Job(
            tuple(Candidate(name, steps) for name, steps in named.items()),
            self.density,
            seconds,
            min_rounds,
            self.target.arch,
        )
        times: dict[str, Timed] = {}
        for outcome in self.runner.run(job):
            if isinstance(outcome, Failed):
                self._fail(stage, named[outcome.name], outcome.reason)
                if outcome.name == default:
                    raise LaunchError(
                        f"the default configuration of {what} does not run on {self.target.name}: {outcome.reason}; "
                        "run `srelu24 doctor`"
                    )
            elif isinstance(outcome, Timed):
                times[outcome.name] = outcome
            elif isinstance(outcome, Progressed) and stage == "pair":
                self.emit(Advanced("pair", what, outcome.fraction * len(named), len(named), "", 1.0))
        self.tried += len(times)
        results = {
            named[name]: (timed, speedup(times[default].samples, timed.samples).median) for name, timed in times.items()
        }
        # The dense ones beside the chain are no trials of this search.
        own = {steps: result for steps, result in results.items() if steps[0].problem in self.chain}
        self.db.add_trial(*(self._trial(stage, steps, timed, ratio) for steps, (timed, ratio) in own.items()))
        return results

    def _trial(
        self,
        stage: Stage,
        steps: tuple[Step, ...],
        timed: Timed | None = None,
        ratio: float | None = None,
        reason: str = "",
    ) -> Trial:
        first = steps[0].problem
        then = None
        if len(steps) == 2:
            p = steps[1].problem
            then = ChainStep(p.family, p.m, p.n, p.k, steps[1].config.to_dict())
        return Trial(
            **self._where(first),
            config=steps[0].config.to_dict(),
            stage=stage,
            outcome="ok" if timed else "failed",
            reason=reason,
            ms=timed.ms if timed else None,
            speedup=ratio,
            samples=len(timed.samples) if timed else 0,
            sm_mhz=timed.sm_mhz if timed else None,
            watts=timed.watts if timed else None,
            source_digest="+".join(self.digests.get((s.problem, s.config), "") for s in steps),
            when=now(),
            then=then,
        )

    def _where(self, problem: Problem) -> dict[str, Any]:
        return {
            "family": problem.family,
            "m": problem.m,
            "n": problem.n,
            "k": problem.k,
            "arch": self.target.arch,
            "gpu": self.target.key,
            "density": self.density,
        }

    def _fail(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        self.db.add_trial(self._trial(stage, steps, reason=reason))
        self._report_failure(stage, steps, reason)

    def _report_failure(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        what = " + ".join(str(step.problem) for step in steps)
        failure = Failure(stage, what, _text(steps), reason)
        self.failures.append(failure)
        if stage == "screen":
            self.failed.add((steps[0].problem, steps[0].config.compiled()))
        self.emit(failure)

    def _earlier(self, problem: Problem) -> dict[tuple[KernelConfig, str], Trial]:
        """The last screening of each configuration and binary at this density."""
        found = {}
        for trial in self.db.trials(problem, self.target):
            with contextlib.suppress(Unsupported):
                if trial.stage == "screen" and trial.density == self.density and trial.source_digest:
                    found[trial.kernel_config(), trial.source_digest] = trial
        return found

    def _take_over(self, problem: Problem, config: KernelConfig, trial: Trial) -> None:
        self.resumed += 1
        if trial.speedup is not None:
            self.screened[problem][config] = trial.speedup
        else:
            self._report_failure("screen", (Step(problem, config),), trial.reason)

    def _advance(self, stage: Stage, problem: Problem, done: float, total: int) -> None:
        known = {c: r.speedup for c, r in self.refined[problem].items()} or self.screened[problem]
        best = max(known, key=known.__getitem__, default=self.defaults[problem])
        text = views.config_text(problem.family.op, best)
        self.emit(Advanced(stage, str(problem), done, total, text, known.get(best, 1.0)))

    def _record(
        self, problem: Problem, config: KernelConfig, best: Timed, base: Timed, dense: Timed | None
    ) -> TuningRecord:
        alone = self.refined[problem][config]
        evidence = Evidence(
            ms=alone.timed.ms,
            default_ms=alone.default.ms,
            pair_ms=best.ms,
            pair_default_ms=base.ms,
            dense_ms=alone.dense.ms if alone.dense else None,
            pair_dense_ms=dense.ms if dense else None,
            samples=len(alone.timed.samples),
            sm_mhz=alone.timed.sm_mhz,
            watts=alone.timed.watts,
            versions=self.runner.versions(),
            source_digest=self.digests[problem, config],
            when=now(),
        )
        return TuningRecord(**self._where(problem), config=config.to_dict(), evidence=evidence)


def _text(steps: tuple[Step, ...]) -> str:
    """Configurations in words, for the reader."""
    dense = "dense " if all(step.problem.family.op is Op.GEMM for step in steps) else ""
    return dense + " + ".join(views.config_text(step.problem.family.op, step.config) for step in steps)
