"""Tables of docs/tuning.md: which models and numbers of tokens have shipped records, and with what evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from srelu24 import views
from srelu24.db import Database
from srelu24.records import TuningRecord
from srelu24.report import filled
from srelu24.report import tables as result_tables
from srelu24_gen import models
from srelu24_gen.models import Model, Shape
from srelu24_gen.spec import DType, KernelConfig

TOKENS = (512, 2048, 8192, 16384)
"""Numbers of tokens at which every model should have a record."""
DTYPE = DType.BF16
"""fp16 records are looked up apart; these tables show bf16."""


def update(document: Path, db: Database, results: Path) -> bool:
    """Fill the tables of a document, those of result files too; True if that changed it.

    Raises:
        RecordError: its markers ask for a table that does not exist.
    """
    before = document.read_text(encoding="utf-8")
    after = filled(before, tables(db.shipped_records()) | result_tables(results), document.name)
    if after != before:
        document.write_text(after, encoding="utf-8")
    return after != before


def tables(records: Iterable[TuningRecord]) -> dict[str, str]:
    """Markdown by name: ``coverage``, a model per row and the numbers of tokens; ``evidence``, a record per row."""
    pairs: dict[str, dict[Shape, tuple[TuningRecord, TuningRecord]]] = {}
    by_key = {r.key: r for r in records}
    for record in by_key.values():
        first, second = Shape.of(record.problem).gemms(DTYPE)
        if record.family == first.family:
            other = by_key.get((record.arch, record.gpu, second.family.name, second.m, second.n, second.k))
            if other is not None:
                pairs.setdefault(record.gpu, {})[Shape.of(record.problem)] = (record, other)
    named = models.all_models()
    coverage = [_coverage(gpu, found, named) for gpu, found in sorted(pairs.items())]
    evidence = [_evidence(gpu, found) for gpu, found in sorted(pairs.items())]
    return {"coverage": "\n".join(coverage), "evidence": "\n".join(evidence)}


def _coverage(gpu: str, found: dict[Shape, tuple[TuningRecord, TuningRecord]], named: Sequence[Model]) -> str:
    def cell(model: Model, m: int) -> str:
        pair = found.get(Shape(m, model.d_model, model.d_ff))
        if pair is None:
            return "-"
        best = pair[0].evidence.best_dense
        return f"{best[1].speedup:.2f}x" if best else "yes"

    rows = [[m.key, f"{m.d_model}x{m.d_ff}", *(cell(m, tokens) for tokens in TOKENS)] for m in named]
    here = sum(cell != "-" for row in rows for cell in row[2:])
    title = f"{gpu}, {DTYPE.value}: {here} of {len(named) * len(TOKENS)}. Times as fast as the best dense FFN:"
    return _table(title, ["model", "DxF", *(f"{m} tokens" for m in TOKENS)], rows)


def _evidence(gpu: str, found: dict[Shape, tuple[TuningRecord, TuningRecord]]) -> str:
    rows = []
    for shape, (first, second) in sorted(found.items(), key=lambda item: (item[0].d, item[0].f, item[0].m)):
        e = first.evidence
        best = e.best_dense
        rows.append(
            [
                str(shape),
                _config(first),
                _config(second),
                _ms(e.pair_ms),
                f"{e.pair_default_ms / e.pair_ms:.3f}x" if e.pair_ms and e.pair_default_ms else "-",
                f"{_ms(best[1].ms)} ({best[0]})" if best else "-",
                f"{best[1].low:.3f}" if best else "-",
                str(e.samples),
                f"{e.sm_mhz:.0f}" if e.sm_mhz else "-",
                e.source_digest[:8],
                e.when[:10],
            ]
        )
    head = ["MxDxF", "GEMM1", "GEMM2", "ms", "over default", "dense ms", "over dense, at least", "samples", "MHz"]
    return _table(f"{gpu}:", [*head, "GEMM1's binary", "date"], rows)


def _config(record: TuningRecord) -> str:
    """In words, and as it stands where this version does not know it."""
    known = set(record.config) <= set(KernelConfig().to_dict())
    return views.config_text(record.family.op, record.config) if known else str(record.config)


def _ms(value: float | None) -> str:
    return f"{value:.3f}" if value else "-"


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n\n".join([title, "\n".join(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
