"""The tables of docs/fp8.md about errors of the 8-bit recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srelu24.documents.tables import markdown_table

if TYPE_CHECKING:
    from srelu24.bench.accuracy import AccuracyFile, Error


def errors_table(file: AccuracyFile, group: str) -> str:
    """A table per case of the candidates of one group: "ffn", or "bound" for formulas that could bound S."""
    head = ["computed as", "vs pruned", "vs dense", "worst row", "row x 1000", "row x 1e-6", "saturated", "lost rows"]
    by_case: dict[tuple[str, float, bool], list[Error]] = {}
    for row in file.rows:
        if row.group == group:
            by_case.setdefault(_case_of(row), []).append(row)
    return "\n".join(
        f"{_title(case)}\n\n{markdown_table(head, [_cells(row) for row in rows])}\n" for case, rows in by_case.items()
    )


def _case_of(row: Error) -> tuple[str, float, bool]:
    return row.shape, row.density, row.aligned


def _title(case: tuple[str, float, bool]) -> str:
    shape, density, aligned = case
    return f"{shape}, {density:.0%} non-zero activations{', aligned features' * aligned}:"


def _cells(row: Error) -> list[str]:
    errors = (row.against_pruned, row.against_dense, row.worst_row, row.outlier_row, row.tiny_row)
    return [row.candidate, *("-" if e is None else f"{e:.2%}" for e in errors), str(row.saturated), str(row.lost_rows)]
