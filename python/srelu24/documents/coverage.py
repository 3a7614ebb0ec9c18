"""Tables of docs/tuning.md: which models and numbers of tokens have shipped records, and with what evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from srelu24.db.database import Database
from srelu24.db.records import Evidence, TuningRecord
from srelu24.documents.pages import refill
from srelu24.documents.pages import tables as result_tables
from srelu24_gen import models
from srelu24_gen.models import Model, Pass, Shape
from srelu24_gen.spec import DType, KernelConfig, config_text

TOKENS = (512, 2048, 8192, 16384)
"""Numbers of tokens at which every model should have a record."""
DTYPE = DType.BF16
"""fp16 records are looked up apart; these tables show bf16."""

Records = tuple[TuningRecord, ...]
"""Of all GEMMs of a pass."""
_Found = dict[str, dict[Shape, Records]]


def update(document: Path, db: Database, results: Path) -> bool:
    """Fill the tables of a document, those of result files too; True if that changed it.

    Raises:
        RecordError: its markers ask for a table that does not exist.
    """
    return refill(document, tables(db.shipped_records()) | result_tables(results))


def tables(records: Iterable[TuningRecord]) -> dict[str, str]:
    """Markdown by name: ``coverage``, a model per row and the numbers of tokens; ``evidence``, an FFN per row; and
    ``step_coverage`` and ``step_evidence``, the same of training steps."""
    by_key = {r.key: r for r in records}
    forward, step = (_complete(by_key, which) for which in Pass)
    named = models.all_models()

    def joined(found: _Found, table: Callable[[str, dict[Shape, Records]], str]) -> str:
        return "\n".join(table(gpu, of_gpu) for gpu, of_gpu in sorted(found.items()))

    return {
        "coverage": joined(
            forward, lambda gpu, of_gpu: _coverage(gpu, of_gpu, named, "the best dense FFN", _over_dense)
        ),
        "evidence": joined(forward, lambda gpu, of_gpu: _evidence(gpu, of_gpu, ("GEMM1", "GEMM2"), _DENSE)),
        "step_coverage": joined(
            step, lambda gpu, of_gpu: _coverage(gpu, of_gpu, named, "its default configurations", _over_default)
        ),
        "step_evidence": joined(step, lambda gpu, of_gpu: _evidence(gpu, of_gpu, _STEP_GEMMS, {})),
    }


def _complete(by_key: dict[tuple[str, str, str, int, int, int], TuningRecord], which: Pass) -> _Found:
    """By GPU, the shapes of which all GEMMs of a pass have a record."""
    found: _Found = {}
    for record in by_key.values():
        shape = Shape.of(record.problem)
        first, *others = shape.gemms_of(which, DTYPE)
        if record.family == first.family:
            rest = [by_key.get((record.arch, record.gpu, p.family.name, p.m, p.n, p.k)) for p in others]
            complete = [record, *(r for r in rest if r is not None)]
            if len(complete) == 1 + len(others):
                found.setdefault(record.gpu, {})[shape] = tuple(complete)
    return found


def _over_dense(e: Evidence) -> str:
    best = e.best_dense
    return f"{best[1].speedup:.2f}x" if best else "yes"


def _over_default(e: Evidence) -> str:
    return f"{e.pair_default_ms / e.pair_ms:.3f}x" if e.pair_ms and e.pair_default_ms else "-"


_STEP_GEMMS = ("hidden", "product", "hidden gradient", "dW1", "dW2")
_DENSE: dict[str, Callable[[Evidence], str]] = {
    "dense ms": lambda e: f"{_ms(best[1].ms)} ({best[0]})" if (best := e.best_dense) else "-",
    "over dense, at least": lambda e: f"{best[1].low:.3f}" if (best := e.best_dense) else "-",
}


def _coverage(
    gpu: str, found: dict[Shape, Records], named: Sequence[Model], against: str, ratio: Callable[[Evidence], str]
) -> str:
    def cell(model: Model, m: int) -> str:
        records = found.get(Shape(m, model.d_model, model.d_ff))
        return ratio(records[0].evidence) if records else "-"

    rows = [[m.key, f"{m.d_model}x{m.d_ff}", *(cell(m, tokens) for tokens in TOKENS)] for m in named]
    here = sum(cell != "-" for row in rows for cell in row[2:])
    title = f"{gpu}, {DTYPE.value}: {here} of {len(named) * len(TOKENS)}. Times as fast as {against}:"
    return _table(title, ["model", "DxF", *(f"{m} tokens" for m in TOKENS)], rows)


def _evidence(
    gpu: str, found: dict[Shape, Records], gemms: Sequence[str], dense: dict[str, Callable[[Evidence], str]]
) -> str:
    rows = []
    for shape, records in sorted(found.items(), key=lambda item: (item[0].d, item[0].f, item[0].m)):
        e = records[0].evidence
        rows.append(
            [
                str(shape),
                *map(_config, records),
                _ms(e.pair_ms),
                _over_default(e),
                *(cell(e) for cell in dense.values()),
                str(e.samples),
                f"{e.sm_mhz:.0f}" if e.sm_mhz else "-",
                e.source_digest[:8],
                e.when[:10],
            ]
        )
    head = ["MxDxF", *gemms, "ms", "over default", *dense, "samples", "MHz", f"{gemms[0]}'s binary", "date"]
    return _table(f"{gpu}:", head, rows)


def _config(record: TuningRecord) -> str:
    """In words, and as it stands where this version does not know it."""
    known = set(record.config) <= set(KernelConfig().to_dict())
    return config_text(record.family.op, record.config) if known else str(record.config)


def _ms(value: float | None) -> str:
    return f"{value:.3f}" if value else "-"


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n\n".join([title, "\n".join(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
