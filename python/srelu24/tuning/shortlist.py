"""What a search tries, and in which order: best guesses first, so that little time still finds the good ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from srelu24.db.database import Database
from srelu24_gen import cost, space
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import KernelConfig, Problem
from srelu24_gen.target import GpuTarget

NEIGHBOURS = 3
"""Winners of other sizes that are tried before anything else."""
BINARIES_SHARE = 0.6
"""Share of the candidates that are binaries of their own; the rest are other runtime fields of the fastest."""


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Candidates of one GEMM besides the default, which is always timed.

    Attributes:
        first: one configuration per binary, winners of neighbouring sizes before those that the cost model ranks best.
        variants: the same binaries with other runtime fields, best guesses first; try those of fast binaries.
        most: how many of both to try.
        pruned: winners of other sizes that cannot work here, each with the reason.
        left_out: candidates of the space that are in neither list.
    """

    default: KernelConfig
    first: list[KernelConfig]
    variants: list[KernelConfig]
    most: int
    pruned: list[tuple[KernelConfig, str]]
    left_out: int

    @property
    def total(self) -> int:
        """How many will be tried if time allows."""
        return min(self.most, len(self.first) + len(self.variants))


def shortlist(problem: Problem, target: GpuTarget, db: Database, most: int) -> Shortlist:
    """The ``most`` likely winners for a problem.

    Raises:
        Unsupported: no kernel computes the problem on ``target``.
    """
    default = cost.best(problem, target)
    winners, pruned = _winners(problem, target, db)
    ranked = cost.rank(problem, target)
    usual = default.runtime_fields()
    # One of each binary: with the default's runtime fields where that is a candidate.
    guesses: dict[KernelConfig, KernelConfig] = {}
    for config in sorted(ranked, key=lambda c: c.runtime_fields() != usual):
        guesses.setdefault(config.compiled(), config)
    by_rank = {config.compiled(): place for place, config in reversed(list(enumerate(ranked)))}
    binaries = sorted(guesses, key=by_rank.__getitem__)
    keep = max(1, round(BINARIES_SHARE * most)) if len(ranked) - 1 > most else len(binaries)
    first = _unique([*winners, *(guesses[b] for b in binaries[:keep])], without={default})
    known = {c.compiled() for c in first} | {default.compiled()}
    variants = [c for c in ranked if c.compiled() in known and c not in first and c != default]
    offered = {*ranked, *winners} - {default}
    return Shortlist(default, first, variants, most, pruned, len(offered - {*first, *variants}))


def _winners(
    problem: Problem, target: GpuTarget, db: Database
) -> tuple[list[KernelConfig], list[tuple[KernelConfig, str]]]:
    """Winners of the nearest record and of other M; and winners that cannot work here, with the reason."""
    tokens = problem.tokens
    near = sorted(
        db.of_widths(problem, target), key=lambda r: abs(r.problem.tokens - tokens) / (r.problem.tokens + tokens)
    )
    match = db.find(problem, target)
    found, pruned = [match.config] if match else [], []
    for record in near:
        try:
            config = record.kernel_config()
        except Unsupported:  # find() has warned
            continue
        verdict = space.supports(problem, config, target)
        if verdict.ok:
            found.append(config)
        else:
            pruned.append((config, verdict.reason))
    return _unique(found)[:NEIGHBOURS], pruned


def _unique(configs: Iterable[KernelConfig], without: Iterable[KernelConfig] = ()) -> list[KernelConfig]:
    return [c for c in dict.fromkeys(configs) if c not in without]
