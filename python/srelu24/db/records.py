"""Tuning records and trials: their fields, and the text files that records are shipped and exchanged in.

Rows come from files and stores that others may have written. :func:`decode_row` is the one place that reads a row, and
what it returns is safe to use: sizes and configurations have bounds, names are fit for paths and tables.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from srelu24 import whole_file
from srelu24.db.store import warn_once
from srelu24_gen import untrusted
from srelu24_gen.errors import RecordError, Unsupported
from srelu24_gen.space import MAX_EXTENT
from srelu24_gen.spec import Family, KernelConfig, Problem

SCHEMA = 1
"""Version of the record and trial fields, in shipped files and in the user's store."""

DENSE_WAYS = ("cublas", "mixed", "gemm")
"""Names of :data:`srelu24.runtime.dense.WAYS`."""
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_EXTENT)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Short = Annotated[str, msgspec.Meta(max_length=200)]
Long = Annotated[str, msgspec.Meta(max_length=4096)]
_DATE = r"20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
"""UTC, as :func:`srelu24.db.store.now` writes it."""
_MOST_FILES = 10_000
"""In a folder of records; ``tuning_db`` has one for each GPU and family."""
_LARGEST_FIELD = 1 << 16
"""Of a configuration; the largest that any kernel has is 256."""
AnyRow = TypeVar("AnyRow", bound="_Row")


class DenseTime(msgspec.Struct, frozen=True):
    """A dense FFN of the same sizes and data, in the rounds of the sparse pair."""

    ms: Positive
    speedup: Positive
    """Dense time over the sparse pair's, median of paired rounds: above 1 the pair is faster."""
    low: Annotated[float, msgspec.Meta(ge=0)]
    """Lower end of its confidence interval (:func:`srelu24.tuning.noise.speedup`)."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a record rests on. Times are medians in milliseconds, interleaved with the default in one process."""

    ms: Positive
    default_ms: Positive
    """The default configuration, in the same rounds."""
    pair_ms: Positive | None = None
    """GEMM1 and GEMM2 chained, or all GEMMs of a training step, each with its winner; None where that was not timed."""
    pair_default_ms: Positive | None = None
    dense: dict[Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(DENSE_WAYS)})\Z")], DenseTime] = {}
    """Whole dense FFNs by :data:`srelu24.runtime.dense.WAYS`, in the rounds of ``pair_ms``."""
    samples: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    spread: float | None = None
    """Interquartile range of the samples over their median."""
    outliers: Count = 0
    """Samples more than three interquartile ranges away from the quartiles."""
    throttled: bool = False
    """Heat or a power brake slowed the GPU meanwhile; the power limit does not count."""
    sm_mhz: float | None = None
    watts: float | None = None
    budget_s: float | None = None
    """Seconds that the search was given."""
    versions: Annotated[dict[Short, Short], msgspec.Meta(max_length=64)] = {}
    source_digest: Short
    """Key of the binary that was timed."""
    when: Annotated[str, msgspec.Meta(pattern=rf"^{_DATE}\Z")]
    """UTC, as :func:`srelu24.db.store.now` writes it."""

    @property
    def best_dense(self) -> tuple[str, DenseTime] | None:
        """The fastest way to run the FFN dense; None where none was timed."""
        return min(self.dense.items(), key=lambda item: item[1].ms, default=None)


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """What records and trials share: the problem, the GPU and the configuration."""

    schema: int = SCHEMA
    family: Family
    m: Size
    n: Size
    k: Size
    arch: Annotated[str, msgspec.Meta(pattern=r"^sm_[0-9]{2,4}[a-z]?\Z")]
    gpu: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*\Z", max_length=100)]
    """:attr:`srelu24_gen.target.GpuTarget.key`."""
    config: dict[str, Any]
    """The fields of a :class:`KernelConfig` by name; never an index into a list of candidates."""
    density: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Share of non-zero activations before pruning in the data it was timed on."""

    @property
    def problem(self) -> Problem:
        return Problem(self.family, self.m, self.n, self.k)

    def kernel_config(self) -> KernelConfig:
        """The configuration; raises Unsupported where this version does not know it."""
        return KernelConfig.from_dict(self.config)

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        """What identifies a record: architecture, GPU, family and sizes."""
        return (self.arch, self.gpu, self.family.name, self.m, self.n, self.k)

    def __str__(self) -> str:
        return f"{self.problem} on {self.gpu}"


class TuningRecord(_Row, frozen=True, kw_only=True):
    """The best configuration known for one problem on one GPU."""

    evidence: Evidence


class ChainStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """A later GEMM of a trial that timed several, one after another."""

    family: Family
    m: Size
    n: Size
    k: Size
    config: dict[str, Any]
    then: ChainStep | None = None


class Trial(_Row, frozen=True, kw_only=True, omit_defaults=True):
    """One configuration tried once: a time, or the reason why there is none."""

    stage: Literal["screen", "refine", "pair"]
    outcome: Literal["ok", "failed"]
    reason: str = ""
    ms: Positive | None = None
    speedup: Positive | None = None
    """Default time / this time, median over paired rounds: comparable between runs, unlike ``ms``."""
    samples: Count = 0
    throttled: bool = False
    sm_mhz: float | None = None
    watts: float | None = None
    source_digest: Long = ""
    when: Annotated[str, msgspec.Meta(pattern=rf"^({_DATE})?\Z")] = ""
    then: ChainStep | None = None
    """Set for a chain: the next GEMM, which names the one after it."""


# --- text files ---


def read_records(path: Path | str) -> list[TuningRecord]:
    """Records of a file or folder that :meth:`srelu24.db.database.Database.export` wrote; RecordError for anything
    else."""
    path = Path(path)
    try:
        files = sorted(itertools.islice(path.rglob("*.json"), _MOST_FILES + 1)) if path.is_dir() else [path]
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error}); give a file or folder of `srelu24 db export`") from error
    if not files or len(files) > _MOST_FILES:
        many = "no tuning records" if not files else f"more than {_MOST_FILES} files"
        raise RecordError(f"{path} holds {many}; give a file or folder that `srelu24 db export` wrote")
    return [record for file in files for record in read_file(file)]


class _File(msgspec.Struct):
    schema: int
    records: list[msgspec.Raw]


def read_file(file: Path, strict: bool = False) -> list[TuningRecord]:
    """Records of one file. A single bad record is skipped with a warning, or an error where `strict`."""
    try:
        text = untrusted.read(file)
    except OSError as error:
        raise RecordError(f"{file} is not a tuning record file ({error}); restore it or delete it") from error
    return decode_file(text, str(file), strict)


def decode_file(text: bytes, where: str, strict: bool = False) -> list[TuningRecord]:
    """Records of the text of a file; errors as of :func:`read_file`."""
    try:
        content = untrusted.decode(text, _File)
    except untrusted.Undecodable as error:
        raise RecordError(f"{where} is not a tuning record file ({error}); restore it or delete it") from error
    if content.schema != SCHEMA:
        raise RecordError(f"{where} has schema {content.schema}, this version reads {SCHEMA}; update srelu24")
    return decode_rows([bytes(raw) for raw in content.records], TuningRecord, where, strict)


def encode_file(records: Iterable[TuningRecord]) -> bytes:
    """Sorted and indented, so that a review shows what changed."""
    content = {"schema": SCHEMA, "records": sorted(records, key=lambda r: r.key)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def write_file(file: Path, records: Iterable[TuningRecord]) -> None:
    """A reader sees the old file or the new one."""
    try:
        whole_file.write(file, encode_file(records))
    except OSError as error:
        raise RecordError(f"{file} cannot be written ({error}); choose another path") from error


def decode_rows(rows: Iterable[object], kind: type[AnyRow], where: str, strict: bool = False) -> list[AnyRow]:
    """The rows that this version can read. A bad one is skipped with a warning, or a RecordError where ``strict``.

    Args:
        rows: JSON in UTF-8; what a damaged store has in the place of it may be anything.
    """
    decoded = []
    for number, row in enumerate(rows, 1):
        try:
            decoded.append(decode_row(row, kind))
        except untrusted.Undecodable as error:
            message = f"{where}: {kind.__name__} number {number} cannot be read ({error})"
            if strict:
                raise RecordError(f"{message}; mend or remove it first") from error
            warn_once(f"{message}; it is skipped")
    return decoded


class _Names(msgspec.Struct):
    """Of a row, what must have no field that this version does not know."""

    family: dict[str, Any]
    then: _Names | None = None


def decode_row(row: object, kind: type[AnyRow]) -> AnyRow:
    """One row, whole and within bounds.

    Raises:
        Undecodable: it is damaged, of a newer schema or family, or holds what no kernel of this version has.
    """
    if not isinstance(row, bytes | str):
        raise untrusted.Undecodable("it is no text")
    item = untrusted.decode(row, kind)
    if item.schema > SCHEMA:
        raise untrusted.Undecodable(f"schema {item.schema} is newer than {SCHEMA}")
    if reason := _why_unusable(item, untrusted.decode(row, _Names)):
        raise untrusted.Undecodable(f"{item}: {reason}")
    return item


def _why_unusable(item: _Row, names: _Names) -> str | None:
    """What the types of the fields cannot say."""
    known = {field.name for field in dataclasses.fields(Family)}
    families: _Names | None = names
    while families is not None:
        if unknown := sorted(families.family.keys() - known):
            return f"its family has the unknown option {unknown[0][:100]!r}"
        families = families.then
    step: _Row | ChainStep | None = item
    while step is not None:
        if reason := _why_no_config(step.config):
            return reason
        step = getattr(step, "then", None)
    when = item.evidence.when if isinstance(item, TuningRecord) else getattr(item, "when", "")
    try:
        datetime.fromisoformat(when or "2026-01-01")
    except ValueError:
        return f"{when} is no date"
    return None


def _why_no_config(fields: dict[str, Any]) -> str | None:
    """Why this version does not know a configuration, or no kernel can have it."""
    try:
        config = KernelConfig.from_dict(fields)
    except Unsupported as error:
        return str(error)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= _LARGEST_FIELD:
            return f"kernel config {field.name} is {value}"
    return None
