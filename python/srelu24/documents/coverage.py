"""Tables of docs/tuning.md: which models and numbers of tokens have shipped records, and with what evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from srelu24.db.records import Evidence, TuningRecord
from srelu24.documents.tables import markdown_table
from srelu24_gen import models
from srelu24_gen.models import Model, Pass, Shape
from srelu24_gen.spec import DType, KernelConfig, config_text

TOKENS = (512, 2048, 8192, 16384)
"""Numbers of tokens at which every model should have a record."""
DTYPE = DType.BF16
"""fp16 records are looked up apart; these tables show bf16."""

Records = tuple[TuningRecord, ...]
"""Of all GEMMs of a pass."""
_ByGpu = dict[str, dict[Shape, Records]]


@dataclass(frozen=True, slots=True)
class Shipped:
    """Records by GPU and shape, where all GEMMs of a pass have one."""

    forward: _ByGpu
    step: _ByGpu

    @classmethod
    def of(cls, records: Iterable[TuningRecord]) -> Self:
        """Sorted by what they are for; records of incomplete shapes are left out."""
        by_key = {r.key: r for r in records}
        return cls(_complete(by_key, Pass.FORWARD), _complete(by_key, Pass.BACKWARD))


def coverage_table(shipped: Shipped) -> str:
    """A model per row: the speed over the best dense FFN at numbers of tokens."""
    return _of_every_gpu(shipped.forward, partial(_coverage, against="the best dense FFN", ratio=_over_dense))


def evidence_table(shipped: Shipped) -> str:
    """An FFN per row: its configurations, and the evidence for them."""
    return _of_every_gpu(shipped.forward, partial(_evidence, gemms=("GEMM1", "GEMM2"), dense=_DENSE))


def step_coverage_table(shipped: Shipped) -> str:
    """A model per row: the speed of a training step over its default configurations at numbers of tokens."""
    return _of_every_gpu(shipped.step, partial(_coverage, against="its default configurations", ratio=_over_default))


def step_evidence_table(shipped: Shipped) -> str:
    """A training step per row: its configurations, and the evidence for them."""
    return _of_every_gpu(shipped.step, partial(_evidence, gemms=_STEP_GEMMS, dense={}))


def _of_every_gpu(found: _ByGpu, table: Callable[[str, dict[Shape, Records]], str]) -> str:
    return "\n".join(table(gpu, of_gpu) for gpu, of_gpu in sorted(found.items()))


def _complete(by_key: dict[tuple[str, str, str, int, int, int], TuningRecord], which: Pass) -> _ByGpu:
    """By GPU, the shapes of which all GEMMs of a pass have a record."""
    found: _ByGpu = {}
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


def _coverage(gpu: str, found: dict[Shape, Records], against: str, ratio: Callable[[Evidence], str]) -> str:
    named = models.all_models()

    def cell(model: Model, m: int) -> str:
        records = found.get(Shape(m, model.d_model, model.d_ff))
        return ratio(records[0].evidence) if records else "-"

    rows = [[m.key, f"{m.d_model}x{m.d_ff}", *(cell(m, tokens) for tokens in TOKENS)] for m in named]
    here = sum(cell != "-" for row in rows for cell in row[2:])
    title = f"{gpu}, {DTYPE.value}: {here} of {len(named) * len(TOKENS)}. Times as fast as {against}:"
    table = markdown_table(["model", "DxF", *(f"{m} tokens" for m in TOKENS)], rows)
    return f"{title}\n\n{table}\n"


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
    return f"{gpu}:\n\n{markdown_table(head, rows)}\n"


def _config(record: TuningRecord) -> str:
    """In words, and as it stands where this version does not know it."""
    known = set(record.config) <= set(KernelConfig().to_dict())
    return config_text(record.family.op, record.config) if known else str(record.config)


def _ms(value: float | None) -> str:
    return f"{value:.3f}" if value else "-"
