"""The tables of ``srelu24 db``: tuning records, and what became of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from srelu24.cli.table import Table
from srelu24.db.fit import Quality
from srelu24.db.health import Difference, Stale
from srelu24.db.records import TuningRecord
from srelu24.db.rekey import Rekeyed
from srelu24.tuning.recheck import Verdict
from srelu24_gen.cost import Constants
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import config_text
from srelu24_gen.target import GpuTarget


def records_table(records: Iterable[TuningRecord]) -> Table:
    """A row per record, under the GPU and the kernel; below it the configuration."""
    columns = ("MxNxK", "density", "ms", "over default", "FFN over dense", "when")
    table = Table("tuning records", columns, right=(1, 2, 3, 4))
    for record in records:
        evidence = record.evidence
        table.add_heading(f"{record.gpu} {record.family.name}")
        table.add_row(
            f"{record.m}x{record.n}x{record.k}",
            f"{record.density:.0%}",
            f"{evidence.ms:.3f}",
            f"{evidence.default_ms / evidence.ms:.3f}x",
            f"{best[1].speedup:.3f}x" if (best := evidence.best_dense) else "-",
            evidence.when,
            details=(_config(record),),
        )
    return table


def differences_table(found: Iterable[Difference]) -> Table:
    """A row per problem; below it both configurations."""
    table = Table("your records", ("what", "ms", "their ms", "speed-up"), right=(1, 2, 3))
    for each in found:
        sides = {"yours": each.yours, "theirs": each.theirs}
        if either := each.yours or each.theirs:
            table.add_heading(f"{either.gpu} {either.problem}")
            table.add_row(
                each.what,
                *(f"{side.evidence.ms:.3f}" if side else "-" for side in sides.values()),
                f"{each.speedup:.3f}x" if each.speedup else "-",
                details=[f"{whose}: {_config(side)}" for whose, side in sides.items() if side],
            )
    return table


def stale_table(rows: Iterable[tuple[str, Stale[TuningRecord]]]) -> Table:
    """A row per stale record, with whose it is; below it the configuration, when it was timed, and why it is stale."""
    table = Table("stale records", ("GPU", "problem", "whose"))
    for source, each in rows:
        details = (f"{_config(each.row)}, timed {each.row.evidence.when}", each.reason)
        table.add_row(each.row.gpu, str(each.row.problem), source, details=details)
    return table


def rekeyed_table(rekeyed: Iterable[Rekeyed]) -> Table:
    """A row per record that stays stale; below it the configuration, and why."""
    table = Table("records that stay stale", ("GPU", "problem"))
    for each in rekeyed:
        table.add_row(each.record.gpu, str(each.record.problem), details=(_config(each.record), each.detail))
    return table


def verdicts_table(verdicts: Iterable[Verdict]) -> Table:
    """A row per record that is not right; below it the configuration, and why."""
    table = Table("records that are not right", ("GPU", "problem", "outcome"))
    for each in verdicts:
        details = (_config(each.record), each.detail)
        table.add_row(each.record.gpu, str(each.record.problem), each.outcome, details=details)
    return table


def fit_table(target: GpuTarget, before: Quality, after: Quality, today: Constants, fitted: Constants) -> Table:
    """How right the cost model is, and its constants: today's and those that were fitted."""
    table = Table(f"cost model, {before.problems} problems on {target.name}", ("", "today", "fitted"), right=(1, 2))
    names = (
        "times off, root mean square",
        "times off, mean",
        "first choice behind, mean",
        "first choice behind, worst",
    )
    for name, *values in zip(names, before[1:], after[1:], strict=True):
        table.add_row(name, *(f"{value:.2%}" for value in values))
    for field in dataclasses.fields(fitted):
        table.add_row(field.name, *(f"{getattr(constants, field.name):.4g}" for constants in (today, fitted)))
    return table


def _config(record: TuningRecord) -> str:
    """The configuration in words, or its fields as they stand where this version does not know it."""
    try:
        return config_text(record.family.op, record.kernel_config())
    except Unsupported:
        return f"unknown to this version: {', '.join(f'{name} {value}' for name, value in record.config.items())}"
