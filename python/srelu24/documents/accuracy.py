"""The tables of docs/fp8.md about errors of the 8-bit recipes."""

from __future__ import annotations

from srelu24.bench.accuracy import AccuracyFile, Error
from srelu24.documents.tables import markdown_table


def tables(file: AccuracyFile) -> dict[str, str]:
    """Markdown by name: ``fp8_accuracy`` and ``fp8_bounds``."""
    head = ["computed as", "vs pruned", "vs dense", "worst row", "row x 1000", "row x 1e-6", "saturated", "lost rows"]
    return {
        f"fp8_{name}": "\n".join(
            f"{_title(case)}\n\n{markdown_table(head, [_cells(row) for row in rows])}\n"
            for case in dict.fromkeys(map(_case_of, file.rows))
            if (rows := [row for row in file.rows if row.group == group and _case_of(row) == case])
        )
        for name, group in (("accuracy", "ffn"), ("bounds", "bound"))
    }


def _case_of(row: Error) -> tuple[str, float, bool]:
    return row.shape, row.density, row.aligned


def _title(case: tuple[str, float, bool]) -> str:
    shape, density, aligned = case
    return f"{shape}, {density:.0%} non-zero activations{', aligned features' * aligned}:"


def _cells(row: Error) -> list[str]:
    errors = (row.against_pruned, row.against_dense, row.worst_row, row.outlier_row, row.tiny_row)
    return [row.candidate, *("-" if e is None else f"{e:.2%}" for e in errors), str(row.saturated), str(row.lost_rows)]
