"""The search for the fastest configurations of GEMMs that run one after another, on any :class:`Runner`.

Those are the two of an FFN, or the five of a training step.

The candidates are ranked first (:mod:`srelu24.tuning.shortlist`); how many are tried follows from the time there is.
Then come three stages, each timed in interleaved rounds against the default configuration:

1. *screen*: candidates for a moment, as soon as they are compiled: a configuration of every binary first, then other
   runtime fields of the fastest;
2. *refine*: the best third again for longer, halved until few are left;
3. *pair*: the best of each GEMM with the best of the others, chained, because they share one power budget, and for an
   FFN in the same rounds the dense FFNs of the same sizes.

Every configuration is verified on a small problem before it is timed, the chain that wins on the real one before it is
stored. A chain replaces the defaults only if it is faster beyond the noise of its own rounds. What is compared and
stored is the ratio to the default, not the time: the clock of a power-bound GPU drifts, that ratio does not.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from srelu24.db.database import Database
from srelu24.db.records import Trial
from srelu24.tuning.events import Advanced, Event, Failure, Stage, StageStarted, TuneReport
from srelu24.tuning.journal import ChainTimes, Journal, Refined
from srelu24.tuning.noise import Chain, Speedup, choose_chain, speedup
from srelu24.tuning.shortlist import Shortlist, shortlist
from srelu24.tuning.worker import Candidate, Failed, Job, Outcome, Progressed, Step, Timed
from srelu24_gen import cost
from srelu24_gen.errors import LaunchError, Srelu24Error
from srelu24_gen.spec import KernelConfig, KernelSpec, Problem, config_text
from srelu24_gen.target import GpuTarget

CHUNK = 12
"""Candidates screened in one interleaved run; few, so that the GPU starts before all is compiled."""
FEWEST = 8
"""Candidates of each GEMM that are tried however little time there is."""
FINALISTS = 3
"""Configurations of each GEMM that meet those of the others, besides the default."""
MOST_CHAINS = 8
SCREEN_SHARE, REFINE_SHARE = 0.45, 0.2
"""Of the time budget; the chains get the rest."""
MIN_ROUNDS: dict[Stage, int] = {"screen": 5, "refine": 8, "pair": 16}
SAMPLE_MS: dict[Stage, float] = {"screen": 6.0, "refine": 8.0, "pair": 10.0}
CALLS_BEFORE = 4
"""Of a candidate until its first round: one to load, one to settle, two to see that the clocks are steady."""
SHORT_S = 30.0
"""A search of less time refines once, and fewer."""


class Runner(Protocol):
    """All that the search asks of a GPU and a compiler."""

    target: GpuTarget

    def start(self) -> None:
        """Get ready, so that the time of a search is for searching; the first of many searches may wait here."""

    def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
        """Every spec once, as it is done, with the key of its binary or the error; closing the generator stops it."""

    def run(self, job: Job) -> Iterator[Outcome]:
        """As :meth:`srelu24.tuning.worker.Worker.run`."""

    def versions(self) -> dict[str, str]:
        """What a time depends on besides the kernel."""

    def now(self) -> float:
        """Seconds on a clock that does not jump."""

    def close(self) -> None:
        """Stop whatever still runs."""


@dataclass
class Search:
    """One chain of GEMMs, of a family each: the state of its search and its three stages."""

    chain: tuple[Problem, ...]
    runner: Runner
    db: Database
    density: float
    budget_s: float
    resume: bool
    emit: Callable[[Event], None]
    dense: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    """Dense FFNs of the same sizes to time along with the chains, by :data:`srelu24.runtime.dense.WAYS`."""

    def __post_init__(self) -> None:
        self.target = self.runner.target
        self.begin = self.runner.now()
        self.journal = Journal(self.db, self.target, self.density, self.budget_s)
        self.lists: dict[Problem, Shortlist] = {
            p: shortlist(p, self.target, self.db, self._most(p)) for p in self.chain
        }
        self.defaults = {p: found.default for p, found in self.lists.items()}
        self.failures: list[Failure] = []
        self.failed: set[tuple[Problem, KernelConfig]] = set()
        self.pruned: list[Failure] = []
        self.screened: dict[Problem, dict[KernelConfig, float]] = {p: {} for p in self.chain}
        self.refined: dict[Problem, dict[KernelConfig, Refined]] = {p: {} for p in self.chain}
        self.tried = self.resumed = self.skipped = 0

    def run(self) -> TuneReport:
        """All three stages; the winners' records are stored."""
        self.begin = self.runner.now()
        for problem, found in self.lists.items():
            for config, reason in found.pruned:
                self._prune(problem, config, reason)
        self._screen()
        for problem in self.chain:
            self._refine(problem)
        chain, gain, times = self._pair()
        versions = self.runner.versions()
        records = [
            self.journal.record(problem, config, self.refined[problem][config], times, versions)
            for problem, config in zip(self.chain, chain, strict=True)
        ]
        for record in records:
            self.db.put(record)
        return TuneReport(
            records=records,
            pair_ms=times.best.ms,
            pair_default_ms=times.default.ms,
            speedup=gain.median,
            kept_default=chain == tuple(self.defaults.values()),
            tried=self.tried,
            resumed=self.resumed,
            skipped=self.skipped,
            failures=self.failures,
            pruned=self.pruned,
            seconds=self.runner.now() - self.begin,
        )

    def _most(self, problem: Problem) -> int:
        """Candidates that the time for screening is enough for: rounds of short samples, or of one call."""
        ms = max(SAMPLE_MS["screen"], cost.cost(problem, cost.best(problem, self.target), self.target).us / 1000)
        each = (CALLS_BEFORE + MIN_ROUNDS["screen"]) * 1.25 * ms / 1000 + 0.02  # a lead to a sample; verification
        return max(FEWEST, int(SCREEN_SHARE * self.budget_s / len(self.chain) / each))

    # --- stages ---

    def _screen(self) -> None:
        """Time what is compiled while the rest compiles: every binary first, then variants of the fastest."""
        deadline = self.begin + SCREEN_SHARE * self.budget_s
        totals = {p: found.total for p, found in self.lists.items()}
        # Six tenths for the rounds: the rest goes to verification, warm-up and waiting for the compiler.
        seconds_each = min(1.0, 0.6 * SCREEN_SHARE * self.budget_s / (sum(totals.values()) + len(totals)))
        earlier: dict[Problem, dict[tuple[KernelConfig, str], Trial]] = {
            p: self.journal.screened(p) if self.resume else {} for p in self.chain
        }
        binaries: dict[Problem, list[KernelConfig]] = {p: [] for p in self.chain}
        variants: dict[Problem, list[KernelConfig]] = {p: [] for p in self.chain}
        seen = dict.fromkeys(self.chain, 0)
        for problem, total in totals.items():
            self.emit(StageStarted("screen", str(problem), total))

        def screen(problem: Problem, waiting: list[KernelConfig]) -> None:
            steps = [(Step(problem, config),) for config in [self.defaults[problem], *waiting[:CHUNK]]]
            times = self._time("screen", steps, seconds_each * len(steps))
            for (step,), (_, ratio) in times.items():
                assert step.config is not None
                self.screened[problem][step.config] = ratio
            done(problem, len(waiting[:CHUNK]))
            del waiting[:CHUNK]

        def done(problem: Problem, count: int) -> None:
            seen[problem] += count
            self._advance("screen", problem, min(seen[problem], totals[problem]), totals[problem])

        for problem, config, built in self._builds():
            default = self.defaults[problem]
            if isinstance(built, Srelu24Error):
                self._fail("screen", (Step(problem, config),), str(built))
                if config == default:
                    raise built
                done(problem, 1)
                continue
            self.journal.digests[problem, config] = built
            if trial := earlier[problem].get((config, built)) if config != default else None:
                self._take_over(problem, config, trial)
                done(problem, 1)
            elif config != default:
                (binaries if config in self.lists[problem].first else variants)[problem].append(config)
            if all((p, self.defaults[p]) in self.journal.digests for p in self.chain) and self.runner.now() >= deadline:
                break
            if len(binaries[problem]) >= CHUNK and (problem, default) in self.journal.digests:
                screen(problem, binaries[problem])
        for problem in self.chain:
            if binaries[problem] and not self.screened[problem]:  # once, however late it is
                screen(problem, binaries[problem])
        for waiting in (binaries, variants):
            for problem in self.chain:
                if waiting is variants:
                    done(problem, self._promising_first(problem, waiting[problem]))
                    del waiting[problem][max(0, totals[problem] - seen[problem]) :]
            while self.runner.now() < deadline and any(waiting.values()):
                problem = max(self.chain, key=lambda p: len(waiting[p]))
                screen(problem, waiting[problem])
        for problem, found in self.lists.items():
            offered = len(found.first) + len(found.variants) + found.left_out
            self.skipped += max(0, offered - seen[problem])

    def _builds(self) -> Iterator[tuple[Problem, KernelConfig, str | Srelu24Error]]:
        """What :meth:`Runner.build` gives; all GEMMs are asked for in turn, so that none waits for the others."""
        problems = {p.family: p for p in self.chain}
        each = (
            [
                KernelSpec(p.family, config, self.target.arch)
                for config in (found.default, *found.first, *found.variants)
            ]
            for p, found in self.lists.items()
        )
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
            self._prune(problem, config, "its binary failed with other runtime fields")
        variants.sort(key=lambda c: -fastest.get(c.compiled(), 0.0))
        return len(failed)

    def _prune(self, problem: Problem, config: KernelConfig, reason: str) -> None:
        text = config_text(problem.family.op, config)
        self.pruned.append(Failure("screen", str(problem), text, reason))

    def _refine(self, problem: Problem) -> None:
        """The best third, halved until the finalists are left; everything is timed again, next to the default."""
        default = self.defaults[problem]
        ranked = sorted((c for c in self.screened[problem] if c != default), key=self.screened[problem].__getitem__)
        most = 8 if self.budget_s >= SHORT_S else FINALISTS + 1
        keep = min(max(FINALISTS, math.ceil(len(ranked) / 3)), most)
        survivors = ranked[::-1][:keep]
        rungs = 1 + max(0, math.ceil(math.log2(max(len(survivors), 1) / (FINALISTS + 1))))
        self.emit(StageStarted("refine", str(problem), rungs))
        end = self.begin + (SCREEN_SHARE + REFINE_SHARE) * self.budget_s
        problems_left = len(self.chain) - self.chain.index(problem)
        seconds = max((end - self.runner.now()) / problems_left, 0.05 * self.budget_s) / rungs
        for rung in range(rungs):
            steps = [(Step(problem, config),) for config in [default, *survivors]]
            # Warm-up and verification come on top of the rounds.
            times = self._time("refine", steps, 0.7 * seconds)
            base = times[steps[0]][0]
            for (step,), (timed, ratio) in times.items():
                assert step.config is not None
                self.refined[problem][step.config] = Refined(timed, base, ratio)
            survivors = [c for c in survivors if (Step(problem, c),) in times]
            survivors.sort(key=lambda c: -self.refined[problem][c].speedup)
            survivors = survivors[: max(FINALISTS, math.ceil(len(survivors) / 2))]
            self._advance("refine", problem, rung + 1, rungs)
        for config in set(self.refined[problem]) - {default, *survivors}:
            del self.refined[problem][config]

    def _pair(self) -> tuple[Chain, Speedup, ChainTimes]:
        """The finalists chained: the chosen chain, verified on the real problems, its gain, and the times."""
        chains = self._chains()
        default = chains[0]
        self.emit(StageStarted("pair", " + ".join(map(str, self.chain)), len(chains) + len(self.dense)))
        left = self.begin + self.budget_s - self.runner.now()
        steps: dict[tuple[Step, ...], Chain] = {tuple(map(Step, self.chain, chain)): chain for chain in chains}
        times = self._time("pair", [*steps, *self.dense.values()], 0.8 * max(left, 0.1 * self.budget_s))
        dense = {way: times.pop(own)[0] for way, own in self.dense.items() if own in times}
        timed = {steps[key]: result for key, (result, _) in times.items()}
        while True:
            chosen, gain = choose_chain({chain: t.samples for chain, t in timed.items()}, default)
            key = next(key for key, chain in steps.items() if chain == chosen)
            # A wrong default ends the search here; another chain makes way for the next best.
            if self._run("pair", [key], 0.0, 1, check="whole"):
                return chosen, gain, ChainTimes(timed[chosen], timed[default], dense)
            del timed[chosen]

    def _chains(self) -> list[Chain]:
        """What is timed chained: the defaults; with the winner of one GEMM after the other, the one of the largest gain
        first, so that no winner is kept for what another gains; then the fastest by the times of each alone."""
        best = {p: self._right_winner(p) for p in self.chain}
        ms = {
            p: {c: known[self.defaults[p]].timed.ms / refined.speedup for c, refined in known.items()}
            for p, known in self.refined.items()
        }
        by_gain = sorted(self.chain, key=lambda p: ms[p][best[p]] - ms[p][self.defaults[p]])
        nested = [
            tuple((best if p in by_gain[:count] else self.defaults)[p] for p in self.chain)
            for count in range(len(self.chain) + 1)
        ]
        ranked = sorted(
            itertools.product(*ms.values()), key=lambda chain: sum(map(lambda p, c: ms[p][c], self.chain, chain))
        )
        most = min(MOST_CHAINS, max(FINALISTS + 1, int(self.budget_s / 4)))
        return list(dict.fromkeys([*nested, *ranked]))[: 1 + max(most, len(self.chain))]

    def _right_winner(self, problem: Problem) -> KernelConfig:
        """The fastest finalist that is right on the real problem too; those that are not are no finalists any more."""
        finalists = self.refined[problem]
        while True:
            best = max(finalists, key=lambda config: finalists[config].speedup)
            step = (Step(problem, best),)
            if best == self.defaults[problem] or self._run("pair", [step], 0.0, 1, check="whole"):
                return best
            del finalists[best]

    # --- what the stages share ---

    def _time(
        self, stage: Stage, candidates: Sequence[tuple[Step, ...]], seconds: float
    ) -> dict[tuple[Step, ...], tuple[Timed, float]]:
        """Times and speed-ups over the first candidate, the default; every result becomes a trial at once."""
        times = self._run(stage, candidates, seconds, MIN_ROUNDS[stage])
        base = times[candidates[0]]
        results = {steps: (timed, speedup(base.samples, timed.samples).median) for steps, timed in times.items()}
        own = {steps: result for steps, result in results.items() if self._own(steps)}
        self.tried += len(own)
        self.journal.trials(stage, own)
        return results

    def _run(
        self,
        stage: Stage,
        candidates: Sequence[tuple[Step, ...]],
        seconds: float,
        min_rounds: int,
        check: Literal["whole", "small"] = "small",
    ) -> dict[tuple[Step, ...], Timed]:
        """Those that are right, with their times; failures are kept.

        Raises:
            LaunchError: the default is among those that failed.
        """
        # Numbers, not words: two configurations may read the same.
        named = {str(number): steps for number, steps in enumerate(candidates)}
        what = " + ".join(str(step.problem) for step in candidates[0])
        job = Job(
            tuple(Candidate(name, steps) for name, steps in named.items()),
            self.density,
            seconds,
            min_rounds,
            check,
            SAMPLE_MS[stage],
            self.target.arch,
        )
        times = {}
        for outcome in self.runner.run(job):
            if isinstance(outcome, Failed):
                steps = named[outcome.name]
                self._fail(stage, steps, outcome.reason)
                if self._own(steps) and all(step.config == self.defaults[step.problem] for step in steps):
                    raise LaunchError(
                        f"the default configuration of {what} does not run on {self.target.name}: {outcome.reason}; "
                        "run `srelu24 doctor`"
                    )
            elif isinstance(outcome, Timed):
                times[named[outcome.name]] = outcome
            elif isinstance(outcome, Progressed) and stage == "pair" and check == "small":
                self.emit(Advanced("pair", what, outcome.fraction * len(named), len(named), "", 1.0))
        return times

    def _own(self, steps: tuple[Step, ...]) -> bool:
        """Not a dense FFN beside the chains: those are no trials of this search."""
        return steps[0].problem in self.chain

    def _fail(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        if self._own(steps):
            self.journal.failure(stage, steps, reason)
        self._report_failure(stage, steps, reason)

    def _report_failure(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        what = " + ".join(str(step.problem) for step in steps)
        text = " + ".join(config_text(s.problem.family.op, s.config) if s.config else "cuBLAS" for s in steps)
        failure = Failure(stage, what, text, reason)
        self.failures.append(failure)
        if stage == "screen" and steps[0].config:
            self.failed.add((steps[0].problem, steps[0].config.compiled()))
        self.emit(failure)

    def _take_over(self, problem: Problem, config: KernelConfig, trial: Trial) -> None:
        self.resumed += 1
        if trial.speedup is not None:
            self.screened[problem][config] = trial.speedup
        else:
            self._report_failure("screen", (Step(problem, config),), trial.reason)

    def _advance(self, stage: Stage, problem: Problem, done: float, total: int) -> None:
        known = {c: r.speedup for c, r in self.refined[problem].items()} or self.screened[problem]
        best = max(known, key=known.__getitem__, default=self.defaults[problem])
        text = config_text(problem.family.op, best)
        self.emit(Advanced(stage, str(problem), done, total, text, known.get(best, 1.0)))
