"""Every table that a page may ask for, by the name of its marker, and what each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from srelu24.bench.ablation.results import AblationFile
from srelu24.bench.results import Result, Row, load_results
from srelu24.db.records import TuningRecord
from srelu24.documents import ablation, accuracy, coverage, support, tables
from srelu24.documents.coverage import Shipped
from srelu24_gen.spec import Activation

if TYPE_CHECKING:
    from srelu24.bench.accuracy import AccuracyFile

Source = TypeVar("Source")
Makers = Mapping[str, Callable[[Source], str]]
"""Functions that make markdown of one source; a table is empty where nothing was measured."""


def _in_16_bits(
    make: Callable[[list[Result]], str], activation: Activation = Activation.RELU2
) -> Callable[[list[Result]], str]:
    def applies(row: Row) -> bool:
        return not row.dtype.startswith("fp8") and (row.activation or Activation.RELU2) == activation

    return lambda results: make([result for result in results if applies(result.row)])


def _in_8_bits(make: Callable[[list[Result]], str]) -> Callable[[list[Result]], str]:
    return lambda results: make([result for result in results if result.row.dtype.startswith("fp8")])


_tuning = partial(tables.ratio_table, other="default", ours="tuned")
_fallback = partial(tables.ratio_table, other="tuned", ours="without a record")

RESULTS: Makers[list[Result]] = {
    "ffn": _in_16_bits(tables.ffn_table),
    "gemm": _in_16_bits(tables.gemm_table),
    "ffn_relu": _in_16_bits(tables.ffn_table, Activation.RELU),
    "gemm_relu": _in_16_bits(tables.gemm_table, Activation.RELU),
    "memory": _in_16_bits(tables.memory_table),
    "overhead": _in_16_bits(tables.overhead_table),
    "step": tables.step_table,
    "step_parts": tables.step_parts_table,
    "split": tables.split_table,
    "tuning": partial(_tuning, op="tuning"),
    "fallback": partial(_fallback, op="fallback"),
    "tuning_step": partial(_tuning, op="tuning_step"),
    "fallback_step": partial(_fallback, op="fallback_step"),
    "search": tables.search_table,
    "sweep": tables.sweep_table,
    "model": tables.model_table,
    "cutlass": tables.cutlass_table,
    "fp8_ffn": _in_8_bits(tables.ffn_table),
    "fp8_gemm": _in_8_bits(tables.gemm_table),
    "fp8_memory": _in_8_bits(tables.memory_table),
    "fp8_figure": tables.recipes_figure,
}
RECORDS: Makers[Shipped] = {
    "coverage": coverage.coverage_table,
    "evidence": coverage.evidence_table,
    "step_coverage": coverage.step_coverage_table,
    "step_evidence": coverage.step_evidence_table,
}
ACCURACY: Makers[AccuracyFile] = {
    "fp8_accuracy": partial(accuracy.errors_table, group="ffn"),
    "fp8_bounds": partial(accuracy.errors_table, group="bound"),
}
ABLATION: Makers[AblationFile] = {
    "training_ablation": ablation.losses_table,
    "training_agreement": ablation.agreement_table,
    "token_groups": ablation.groups_table,
}
SUPPORT: Mapping[str, Callable[[], str]] = {"support": support.markdown}


def of_results(folder: Path) -> dict[str, str]:
    """The tables of the result files in a folder.

    Raises:
        RecordError: a file is no result file.
    """
    return _make(RESULTS, load_results(folder))


def of_records(records: Iterable[TuningRecord]) -> dict[str, str]:
    """The tables of shipped records."""
    return _make(RECORDS, Shipped.of(records))


def of_accuracy(file: AccuracyFile) -> dict[str, str]:
    """The tables of the errors of the 8-bit recipes."""
    return _make(ACCURACY, file)


def of_ablation(file: AblationFile) -> dict[str, str]:
    """The tables of an ablation of the training method."""
    return _make(ABLATION, file)


def of_gpus() -> dict[str, str]:
    """The table of GPUs and the kernels that run on them."""
    return {name: make() for name, make in SUPPORT.items()}


def _make(makers: Makers[Source], source: Source) -> dict[str, str]:
    return {name: make(source) for name, make in makers.items()}
