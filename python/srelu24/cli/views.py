"""What the commands print: rich tables on stdout, notes and progress on stderr, and JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from srelu24.bench.results import Row
from srelu24.cli.doctor import Check, Status
from srelu24.db.records import TuningRecord
from srelu24_gen.spec import Op, config_text

PIPE_WIDTH = 140
"""Columns where the output is no terminal; rich would take 80 and break the tables."""

_STATUS_STYLE = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or as a table needs where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def show(table: Table) -> None:
    """Prints a table on stdout."""
    console().print(table)


def note(text: str, style: str = "") -> None:
    """Prints a line for the reader, not part of the data, on stderr."""
    console(stderr=True).print(escape(text), style=style, soft_wrap=True)


def show_json(data: object) -> None:
    """Prints data on stdout as indented JSON; Structs and dataclasses by their fields."""
    print(msgspec.json.format(msgspec.json.encode(data, enc_hook=str), indent=2).decode())


def progress() -> Progress:
    """A progress bar on stderr, gone when it is done; none where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    stderr = console(stderr=True)
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def doctor_table(checks: Iterable[Check]) -> Table:
    grid = table("srelu24 doctor", ("check", "status", "found", "to mend"))
    for check in checks:
        style = _STATUS_STYLE[check.status]
        grid.add_row(check.name, f"[{style}]{check.status.value}[/]", escape(check.found), escape(check.mend))
    return grid


def kernels_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Candidates of one shape: rows as :func:`srelu24.cli.run.kernels` gives them."""
    columns = ("kernel", "config", "chosen", "from", "built", "recorded", "predicted us", "bound by")
    grid = table(title, columns, right=(6,))
    for row in rows:
        grid.add_row(
            row["family"],
            config_text(Op(row["op"]), row["config"]),
            "[green]yes[/]" if row["chosen"] else "",
            row["source"] or "",
            "yes" if row["built"] else "",
            "yes" if row["recorded"] else "",
            f"{row['predicted_us']:.0f}",
            row["bound"],
        )
    return grid


def built_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Compiled kernels: rows as :func:`srelu24.cli.run.build_kernels` gives them."""
    grid = table("kernels", ("kernel", "registers", "spill bytes", "smem bytes", "seconds", ""), right=(1, 2, 3, 4))
    for row in rows:
        if row["error"]:
            grid.add_row(row["name"], "", "", "", "", f"[bold red]{escape(row['error'])}[/]")
            continue
        spills = row["spill_bytes"]
        grid.add_row(
            row["name"],
            str(row["registers"]),
            f"[yellow]{spills}[/]" if spills else "0",
            str(row["smem_bytes"]),
            f"{row['seconds']:.2f}",
            "from the cache" if row["from_cache"] else "compiled",
        )
    return grid


def records_table(records: Iterable[TuningRecord]) -> Table:
    columns = ("GPU", "kernel", "MxNxK", "config", "density", "ms", "over default", "FFN over dense", "when")
    grid = table("tuning records", columns, right=(4, 5, 6, 7))
    for record in records:
        evidence = record.evidence
        grid.add_row(
            record.gpu,
            record.family.name,
            f"{record.m}x{record.n}x{record.k}",
            config_text(record.family.op, record.config),
            f"{record.density:.0%}",
            f"{evidence.ms:.3f}",
            f"{evidence.default_ms / evidence.ms:.3f}x",
            f"{best[1].speedup:.3f}x" if (best := evidence.best_dense) else "-",
            evidence.when,
        )
    return grid


def bench_table(rows: Iterable[Row]) -> Table:
    """Benchmark rows (docs/benchmarks.md): our time, its share of the speed of light, the speed-up over each peer."""
    rows = list(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row.speedup))
    columns = ["op", "dtype", "MxDxF", "density", "ms", "TFLOP/s", "of light", *(f"over {peer}" for peer in peers)]
    grid = table("benchmark", columns, right=range(3, len(columns)))
    for row in rows:
        ours = row.candidates.get("srelu24")
        grid.add_row(
            row.op,
            row.dtype,
            row.shape,
            f"{row.density:.0%}",
            _number(ours.ms if ours else None, ".3f"),
            _number(ours.tflops if ours else None, ".0f"),
            _number(row.speed_of_light, ".0%"),
            *(_number(row.speedup.get(peer), ".3f", "x") for peer in peers),
        )
    return grid


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def table(title: str, columns: Iterable[str], right: Iterable[int] = ()) -> Table:
    """An empty table; the columns numbered in ``right`` hold numbers."""
    grid = Table(title=title, title_justify="left")
    to_the_right = set(right)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="right" if index in to_the_right else "left", overflow="fold")
    return grid
