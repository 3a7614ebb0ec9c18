"""What a search knows of one of its GEMMs: the candidates that wait, and the results so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from srelu24.db.records import Trial
from srelu24.tuning.journal import Refined
from srelu24.tuning.shortlist import Shortlist
from srelu24_gen.spec import KernelConfig, Problem


@dataclass(eq=False)
class Gemm:
    """One GEMM of the chain that is searched. Every ratio is the speed over the default configuration."""

    problem: Problem
    shortlist: Shortlist
    earlier: Mapping[tuple[KernelConfig, str], Trial] = field(default_factory=dict)
    """Screenings of earlier searches, by configuration and key of the binary."""
    binaries: list[KernelConfig] = field(default_factory=list)
    """Built and not timed yet: one configuration of each binary."""
    variants: list[KernelConfig] = field(default_factory=list)
    """Built and not timed yet: other runtime fields of those binaries."""
    failed: set[KernelConfig] = field(default_factory=set)
    """The binaries (:meth:`KernelConfig.compiled`) that failed while they were screened."""
    screened: dict[KernelConfig, float] = field(default_factory=dict)
    """Ratio of every configuration that was screened."""
    refined: dict[KernelConfig, Refined] = field(default_factory=dict)
    """Longer times of the default and of the configurations that are still in the search."""
    handled: int = 0
    """Candidates that need no more screening: timed, taken over from an earlier search, failed or left out."""

    @property
    def default(self) -> KernelConfig:
        """The configuration that all others are compared with."""
        return self.shortlist.default

    @property
    def total(self) -> int:
        """Candidates to screen if time allows."""
        return self.shortlist.total

    @property
    def not_reached(self) -> int:
        """Candidates of the space that the screening did not come to."""
        offered = len(self.shortlist.first) + len(self.shortlist.variants) + self.shortlist.left_out
        return max(0, offered - self.handled)

    @property
    def best(self) -> tuple[KernelConfig, float]:
        """The fastest configuration so far and its ratio; the default where nothing was timed."""
        ratios = {config: result.speedup for config, result in self.refined.items()} or self.screened
        config = max(ratios, key=ratios.__getitem__, default=self.default)
        return config, ratios.get(config, 1.0)

    def queue(self, config: KernelConfig) -> None:
        """Let a built candidate wait for its screening."""
        (self.binaries if config in self.shortlist.first else self.variants).append(config)

    def drop_variants_of_failed_binaries(self) -> list[KernelConfig]:
        """Remove the waiting variants whose binary failed, and return them."""
        dropped = [config for config in self.variants if config.compiled() in self.failed]
        self.variants = [config for config in self.variants if config.compiled() not in self.failed]
        return dropped

    def sort_variants(self) -> None:
        """Put the waiting variants of the fastest binaries first, and keep as many as there are left to screen."""
        ratios: dict[KernelConfig, float] = {}
        for config, ratio in self.screened.items():
            ratios[config.compiled()] = max(ratio, ratios.get(config.compiled(), 0.0))
        self.variants.sort(key=lambda config: -ratios.get(config.compiled(), 0.0))
        del self.variants[max(0, self.total - self.handled) :]

    def fastest_screened(self) -> list[KernelConfig]:
        """The screened configurations besides the default, the fastest first."""
        others = (config for config in self.screened if config != self.default)
        return sorted(others, key=self.screened.__getitem__)[::-1]

    def forget_refined_except(self, finalists: list[KernelConfig]) -> None:
        """Keep the longer times of the default and of the finalists alone."""
        self.refined = {c: result for c, result in self.refined.items() if c == self.default or c in finalists}

    def times_alone(self) -> dict[KernelConfig, float]:
        """Milliseconds of the default and of the finalists, each as the default's time over its own ratio."""
        default_ms = self.refined[self.default].timed.ms
        return {config: default_ms / result.speedup for config, result in self.refined.items()}
