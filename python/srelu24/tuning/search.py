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
from srelu24.tuning.events import Advanced, Event, Failure, Stage, StageStarted, TuneReport
from srelu24.tuning.gemm import Gemm
from srelu24.tuning.journal import ChainTimes, Journal, Refined
from srelu24.tuning.noise import Chain, Speedup, choose_chain, speedup
from srelu24.tuning.shortlist import shortlist
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
"""Configurations of each GEMM that are chained with those of the others, besides the default."""
MOST_CHAINS = 8
SCREEN_SHARE, REFINE_SHARE = 0.45, 0.2
"""Shares of the time budget; the chains get the rest."""
MIN_ROUNDS: dict[Stage, int] = {"screen": 5, "refine": 8, "pair": 16}
SAMPLE_MS: dict[Stage, float] = {"screen": 6.0, "refine": 8.0, "pair": 10.0}
CALLS_BEFORE = 4
"""Calls of a candidate before its first round: one to load, one to settle, two to see that the clocks are steady."""
SHORT_S = 30.0
"""A shorter search refines fewer candidates, in one step."""


class Runner(Protocol):
    """What the search needs of a GPU and a compiler."""

    target: GpuTarget

    def start(self) -> None:
        """Get ready, so that the time of a search is for searching; the first of many searches may wait here."""

    def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
        """Build and yield every spec once, with the key of its binary or the error; closing the generator stops it."""

    def run(self, job: Job) -> Iterator[Outcome]:
        """As :meth:`srelu24.tuning.worker.Worker.run`."""

    def versions(self) -> dict[str, str]:
        """Versions and settings of the machine that a time depends on."""

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
        self.gemms = {p: Gemm(p, shortlist(p, self.target, self.db, self._affordable(p))) for p in self.chain}
        self.failures: list[Failure] = []
        self.pruned: list[Failure] = []
        self.tried = self.resumed = 0

    def run(self) -> TuneReport:
        """Run the three stages and store the winners' records."""
        self.begin = self.runner.now()
        for gemm in self.gemms.values():
            for config, reason in gemm.shortlist.pruned:
                self._prune(gemm, config, reason)
        self._screen()
        for gemm in self.gemms.values():
            self._refine(gemm)
        chain, gain, times = self._pair()
        versions = self.runner.versions()
        records = [
            self.journal.record(gemm.problem, config, gemm.refined[config], times, versions)
            for gemm, config in zip(self.gemms.values(), chain, strict=True)
        ]
        for record in records:
            self.db.put(record)
        return TuneReport(
            records=records,
            pair_ms=times.best.ms,
            pair_default_ms=times.default.ms,
            speedup=gain.median,
            kept_default=chain == self._defaults,
            tried=self.tried,
            resumed=self.resumed,
            skipped=sum(gemm.not_reached for gemm in self.gemms.values()),
            failures=self.failures,
            pruned=self.pruned,
            seconds=self.runner.now() - self.begin,
        )

    def _affordable(self, problem: Problem) -> int:
        """How many candidates there is time to screen, in rounds of short samples or of one call each."""
        ms = max(SAMPLE_MS["screen"], cost.cost(problem, cost.best(problem, self.target), self.target).us / 1000)
        each = (CALLS_BEFORE + MIN_ROUNDS["screen"]) * 1.25 * ms / 1000 + 0.02  # a lead to a sample; verification
        return max(FEWEST, int(SCREEN_SHARE * self.budget_s / len(self.chain) / each))

    @property
    def _defaults(self) -> Chain:
        return tuple(gemm.default for gemm in self.gemms.values())

    # --- screen ---

    def _screen(self) -> None:
        """Time what is compiled while the rest compiles: every binary first, then variants of the fastest."""
        gemms = list(self.gemms.values())
        for gemm in gemms:
            gemm.earlier = self.journal.screened(gemm.problem) if self.resume else {}
            self.emit(StageStarted("screen", str(gemm.problem), gemm.total))
        self._screen_while_building()
        for gemm in gemms:
            if gemm.binaries and not gemm.screened:  # at least once, even after the deadline
                self._screen_next(gemm, gemm.binaries)
        self._screen_until_deadline([(gemm, gemm.binaries) for gemm in gemms])
        for gemm in gemms:
            dropped = gemm.drop_variants_of_failed_binaries()
            for config in dropped:
                self._prune(gemm, config, "its binary failed with other runtime fields")
            self._count_screened(gemm, len(dropped))
            gemm.sort_variants()
        self._screen_until_deadline([(gemm, gemm.variants) for gemm in gemms])

    @property
    def _screen_deadline(self) -> float:
        return self.begin + SCREEN_SHARE * self.budget_s

    @property
    def _screen_seconds(self) -> float:
        """Of rounds for each candidate: six tenths of the time; verification, warm-up and compiling take the rest."""
        candidates = sum(1 + gemm.total for gemm in self.gemms.values())
        return min(1.0, 0.6 * SCREEN_SHARE * self.budget_s / candidates)

    def _screen_while_building(self) -> None:
        """Screen binaries whenever enough of them are built, until all is built or the time is up."""
        for gemm, config, built in self._builds():
            if isinstance(built, Srelu24Error):
                self._record_failure("screen", (Step(gemm.problem, config),), str(built))
                if config == gemm.default:
                    raise built
                self._count_screened(gemm, 1)
                continue
            self._receive(gemm, config, built)
            if self.runner.now() >= self._screen_deadline and all(map(self._has_default, self.gemms.values())):
                break
            if len(gemm.binaries) >= CHUNK and self._has_default(gemm):
                self._screen_next(gemm, gemm.binaries)

    def _builds(self) -> Iterator[tuple[Gemm, KernelConfig, str | Srelu24Error]]:
        """Build the candidates of all GEMMs in turn, so that none waits for the others; yields each as it is done."""
        by_family = {gemm.problem.family: gemm for gemm in self.gemms.values()}
        each = (
            [
                KernelSpec(family, config, self.target.arch)
                for config in (gemm.default, *gemm.shortlist.first, *gemm.shortlist.variants)
            ]
            for family, gemm in by_family.items()
        )
        specs = [spec for turn in itertools.zip_longest(*each) for spec in turn if spec is not None]
        with contextlib.closing(self.runner.build(specs)) as builds:
            for spec, built in builds:
                yield by_family[spec.family], spec.config, built

    def _receive(self, gemm: Gemm, config: KernelConfig, digest: str) -> None:
        """Let a built candidate wait for its screening, unless an earlier search has screened the same binary."""
        self.journal.digests[gemm.problem, config] = digest
        if config == gemm.default:
            return
        trial = gemm.earlier.get((config, digest))
        if trial is None:
            gemm.queue(config)
            return
        self.resumed += 1
        if trial.speedup is not None:
            gemm.screened[config] = trial.speedup
        else:
            self._report_failure("screen", (Step(gemm.problem, config),), trial.reason)
        self._count_screened(gemm, 1)

    def _has_default(self, gemm: Gemm) -> bool:
        return (gemm.problem, gemm.default) in self.journal.digests

    def _screen_until_deadline(self, waiting: Sequence[tuple[Gemm, list[KernelConfig]]]) -> None:
        """Screen candidates until the time is up, each time of the GEMM of which most wait."""
        while self.runner.now() < self._screen_deadline and any(configs for _, configs in waiting):
            self._screen_next(*max(waiting, key=lambda each: len(each[1])))

    def _screen_next(self, gemm: Gemm, waiting: list[KernelConfig]) -> None:
        """Take the first of those that wait, and time them beside the default."""
        configs = waiting[:CHUNK]
        del waiting[:CHUNK]
        times = self._time_alone("screen", gemm, configs, self._screen_seconds * (1 + len(configs)))
        gemm.screened |= {config: result.speedup for config, result in times.items()}
        self._count_screened(gemm, len(configs))

    def _count_screened(self, gemm: Gemm, count: int) -> None:
        gemm.handled += count
        self._advance("screen", gemm, min(gemm.handled, gemm.total), gemm.total)

    def _prune(self, gemm: Gemm, config: KernelConfig, reason: str) -> None:
        text = config_text(gemm.problem.family.op, config)
        self.pruned.append(Failure("screen", str(gemm.problem), text, reason))

    # --- refine ---

    def _refine(self, gemm: Gemm) -> None:
        """The best third, halved until the finalists are left; everything is timed again, next to the default."""
        fastest = gemm.fastest_screened()
        most = 8 if self.budget_s >= SHORT_S else FINALISTS + 1
        survivors = fastest[: min(max(FINALISTS, math.ceil(len(fastest) / 3)), most)]
        rungs = 1 + max(0, math.ceil(math.log2(max(len(survivors), 1) / (FINALISTS + 1))))
        self.emit(StageStarted("refine", str(gemm.problem), rungs))
        end = self.begin + (SCREEN_SHARE + REFINE_SHARE) * self.budget_s
        gemms_left = len(self.chain) - self.chain.index(gemm.problem)
        seconds = max((end - self.runner.now()) / gemms_left, 0.05 * self.budget_s) / rungs
        for rung in range(rungs):
            # Warm-up and verification come on top of the rounds.
            times = self._time_alone("refine", gemm, survivors, 0.7 * seconds)
            gemm.refined |= times
            survivors = sorted((c for c in survivors if c in times), key=lambda c: -times[c].speedup)
            survivors = survivors[: max(FINALISTS, math.ceil(len(survivors) / 2))]
            self._advance("refine", gemm, rung + 1, rungs)
        gemm.forget_refined_except(survivors)

    # --- pair ---

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
        gemms = list(self.gemms.values())
        best = {gemm.problem: self._verified_winner(gemm) for gemm in gemms}
        ms = {gemm.problem: gemm.times_alone() for gemm in gemms}
        by_gain = sorted(gemms, key=lambda gemm: ms[gemm.problem][best[gemm.problem]] - ms[gemm.problem][gemm.default])
        nested = [
            tuple(best[gemm.problem] if gemm in by_gain[:count] else gemm.default for gemm in gemms)
            for count in range(len(gemms) + 1)
        ]
        ranked = sorted(
            itertools.product(*ms.values()), key=lambda chain: sum(map(lambda p, c: ms[p][c], self.chain, chain))
        )
        most = min(MOST_CHAINS, max(FINALISTS + 1, int(self.budget_s / 4)))
        return list(dict.fromkeys([*nested, *ranked]))[: 1 + max(most, len(self.chain))]

    def _verified_winner(self, gemm: Gemm) -> KernelConfig:
        """The fastest finalist that is right on the real problem, too. Those that are wrong leave the search."""
        while True:
            best, _ = gemm.best
            step = (Step(gemm.problem, best),)
            if best == gemm.default or self._run("pair", [step], 0.0, 1, check="whole"):
                return best
            del gemm.refined[best]

    # --- what the stages share ---

    def _time_alone(
        self, stage: Stage, gemm: Gemm, configs: Sequence[KernelConfig], seconds: float
    ) -> dict[KernelConfig, Refined]:
        """Times of the default and of the configurations of one GEMM that are right, each with the default's."""
        steps = {config: (Step(gemm.problem, config),) for config in (gemm.default, *configs)}
        times = self._time(stage, list(steps.values()), seconds)
        base, _ = times[steps[gemm.default]]
        return {config: Refined(times[own][0], base, times[own][1]) for config, own in steps.items() if own in times}

    def _time(
        self, stage: Stage, candidates: Sequence[tuple[Step, ...]], seconds: float
    ) -> dict[tuple[Step, ...], tuple[Timed, float]]:
        """Times and speed-ups over the first candidate, the default; every result becomes a trial at once."""
        times = self._run(stage, candidates, seconds, MIN_ROUNDS[stage])
        base = times[candidates[0]]
        results = {steps: (timed, speedup(base.samples, timed.samples).median) for steps, timed in times.items()}
        own = {steps: result for steps, result in results.items() if self._is_searched(steps)}
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
        """Times of the candidates that are right; failures are written down.

        Raises:
            LaunchError: the default is among those that failed.
        """
        # Candidates are named by numbers: the texts of two configurations may be the same.
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
                self._record_failure(stage, steps, outcome.reason)
                if self._is_searched(steps) and all(step.config == self.gemms[step.problem].default for step in steps):
                    raise LaunchError(
                        f"the default configuration of {what} does not run on {self.target.name}: {outcome.reason}; "
                        "run `srelu24 doctor`"
                    )
            elif isinstance(outcome, Timed):
                times[named[outcome.name]] = outcome
            elif isinstance(outcome, Progressed) and stage == "pair" and check == "small":
                self.emit(Advanced("pair", what, outcome.fraction * len(named), len(named), "", 1.0))
        return times

    def _is_searched(self, steps: tuple[Step, ...]) -> bool:
        """Whether it is of the chain that is searched. The dense FFNs beside it are not: they are no trials."""
        return steps[0].problem in self.chain

    def _record_failure(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        if self._is_searched(steps):
            self.journal.failure(stage, steps, reason)
        self._report_failure(stage, steps, reason)

    def _report_failure(self, stage: Stage, steps: tuple[Step, ...], reason: str) -> None:
        what = " + ".join(str(step.problem) for step in steps)
        text = " + ".join(config_text(s.problem.family.op, s.config) if s.config else "cuBLAS" for s in steps)
        failure = Failure(stage, what, text, reason)
        self.failures.append(failure)
        if stage == "screen" and steps[0].config:
            self.gemms[steps[0].problem].failed.add(steps[0].config.compiled())
        self.emit(failure)

    def _advance(self, stage: Stage, gemm: Gemm, done: float, total: int) -> None:
        best, ratio = gemm.best
        text = config_text(gemm.problem.family.op, best)
        self.emit(Advanced(stage, str(gemm.problem), done, total, text, ratio))
