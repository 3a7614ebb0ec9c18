"""What the commands print: tables on stdout, notes and progress on stderr, and JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from srelu24.bench.results import Candidate, Row
from srelu24.cli.doctor import Check, Status
from srelu24.cli.table import Table
from srelu24_gen.models import Model
from srelu24_gen.spec import Op, config_text

PIPE_WIDTH = 80
"""Columns where the output is no terminal."""

_STATUS_STYLE = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, and of :data:`PIPE_WIDTH` where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def show(table: Table) -> None:
    """Prints a table on stdout."""
    console().print(table, crop=False)


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


# --- tables ---


def doctor_table(checks: Iterable[Check]) -> Table:
    """A row per check; below it what was found, and what to do about it."""
    table = Table("srelu24 doctor", ("check", "status"))
    for check in checks:
        mend = f"to mend: {check.mend}" if check.mend else ""
        table.add_row(check.name, Text(check.status.value, _STATUS_STYLE[check.status]), details=(check.found, mend))
    return table


def models_table(known: Iterable[Model]) -> Table:
    """A row per model that ``--model`` takes; below it a note."""
    table = Table("models", ("model", "D", "F", "name"), right=(1, 2))
    for each in known:
        table.add_row(each.key, str(each.d_model), str(each.d_ff), each.name, details=(each.note,))
    return table


def support_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per GPU; below it the products of each kind of kernel. Rows of :func:`srelu24.documents.support.matrix`."""
    products: dict[tuple[str, str, str], dict[str, dict[str, list[str]]]] = {}
    for row in rows:
        by_kind = products.setdefault((row["gpu"], row["name"], row["arch"]), {})
        by_kind.setdefault(row["kernels"], {}).setdefault(row["product"], []).append(row["dtype"])
    table = Table("kernels of each GPU", ("--gpu", "GPU", "compiled for"))
    for gpu, by_kind in products.items():
        table.add_row(*gpu, details=[f"{kind}: {_products(found)}" for kind, found in by_kind.items()])
    return table


def _products(dtypes: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{product} ({', '.join(of_product)})" for product, of_product in dtypes.items())


def kernels_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A row per candidate of one shape, with the time that the cost model predicts; below it what is known of it.

    Rows are as :func:`srelu24.shipping.catalogue.kernels` gives them.
    """
    table = Table(title, ("configuration", "us", "bound by"), right=(1,))
    for row in rows:
        table.add_heading(row["family"])
        known = [f"chosen ({row['source']})"] * row["chosen"] + [what for what in ("built", "recorded") if row[what]]
        table.add_row(
            config_text(Op(row["op"]), row["config"]),
            f"{row['predicted_us']:.0f}",
            row["bound"],
            details=(Text(", ".join(known), "green" if row["chosen"] else ""),),
        )
    return table


def built_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per compiled kernel: rows as :func:`srelu24.shipping.catalogue.build_kernels` gives them."""
    table = Table("kernels", ("", "registers", "spill bytes", "smem bytes", "seconds"), right=(1, 2, 3, 4))
    for row in rows:
        table.add_heading(row["name"])
        if row["error"]:
            table.add_row(Text("failed", "bold red"), "", "", "", "", details=(Text(row["error"], "bold red"),))
            continue
        spills = row["spill_bytes"]
        table.add_row(
            "from the cache" if row["from_cache"] else "compiled",
            str(row["registers"]),
            Text(str(spills), "yellow" if spills else ""),
            str(row["smem_bytes"]),
            f"{row['seconds']:.2f}",
        )
    return table


def bench_table(rows: Iterable[Row]) -> Table:
    """A row per candidate of every comparison (docs/benchmarks.md); what srelu24 is faster by is of the same rounds."""
    columns = ("candidate", "ms", "rate", "joules", "MHz", "of light", "srelu24 is faster by")
    table = Table("benchmark", columns, right=range(1, len(columns)))
    for row in rows:
        data = "zeros" if row.zeros is True else f"density {row.density:.0%}"
        recipe = f" {row.recipe}" if row.recipe else ""
        table.add_heading(f"{row.op} {row.shape} {row.dtype}{recipe}, {data}")
        for name, candidate in row.candidates.items():
            table.add_row(
                name,
                _number(candidate.ms, ".3f"),
                _rate(candidate),
                _number(candidate.joules, ".2f"),
                _number(candidate.sm_mhz, ".0f"),
                _number(row.speed_of_light if name == "srelu24" else None, ".0%"),
                _number(row.speedup.get(name), ".3f", "x"),
                details=[text for text in (candidate.note, candidate.error) if isinstance(text, str)],
            )
    return table


def _rate(candidate: Candidate) -> str:
    """Whatever the benchmark counts: tokens, bytes or operations."""
    if isinstance(candidate.tokens_per_s, float):
        return f"{candidate.tokens_per_s:.0f} tokens/s"
    if isinstance(candidate.gbps, float):
        return f"{candidate.gbps:.0f} GB/s"
    return _number(candidate.tflops, ".0f", " TFLOP/s")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
