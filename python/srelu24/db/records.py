"""Tuning records and trials: their fields, and the text files that records are shipped and exchanged in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from srelu24 import whole_file
from srelu24.db.store import warn_once
from srelu24_gen.errors import RecordError
from srelu24_gen.spec import Family, KernelConfig, Problem

SCHEMA = 1
"""Version of the record and trial fields, in shipped files and in the user's store."""

Size = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
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
    dense: dict[str, DenseTime] = {}
    """Whole dense FFNs by :data:`srelu24.runtime.dense.WAYS`, in the rounds of ``pair_ms``."""
    samples: Annotated[int, msgspec.Meta(ge=1)]
    spread: float | None = None
    """Interquartile range of the samples over their median."""
    outliers: int = 0
    """Samples more than three interquartile ranges away from the quartiles."""
    throttled: bool = False
    """Heat or a power brake slowed the GPU meanwhile; the power limit does not count."""
    sm_mhz: float | None = None
    watts: float | None = None
    budget_s: float | None = None
    """Seconds that the search was given."""
    versions: dict[str, str] = {}
    source_digest: str
    """Key of the binary that was timed."""
    when: str
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
    arch: str
    gpu: str
    """:attr:`GpuTarget.key`."""
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
    samples: int = 0
    throttled: bool = False
    sm_mhz: float | None = None
    watts: float | None = None
    source_digest: str = ""
    when: str = ""
    then: ChainStep | None = None
    """Set for a chain: the next GEMM, which names the one after it."""


# --- text files ---


def read_records(path: Path | str) -> list[TuningRecord]:
    """Records of a file or folder that :meth:`Database.export` wrote; RecordError for anything else."""
    path = Path(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise RecordError(f"{path} holds no tuning records; give a file or folder that `srelu24 db export` wrote")
    return [record for file in files for record in read_file(file)]


class _File(msgspec.Struct):
    schema: int
    records: list[msgspec.Raw]


def read_file(file: Path, strict: bool = False) -> list[TuningRecord]:
    """Records of one file. A single bad record is skipped with a warning, or an error where `strict`."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise RecordError(f"{file} is not a tuning record file ({error}); restore it or delete it") from error
    return decode_file(text, str(file), strict)


def decode_file(text: bytes, where: str, strict: bool = False) -> list[TuningRecord]:
    """Records of the text of a file; errors as of :func:`read_file`."""
    try:
        content = msgspec.json.decode(text, type=_File)
    except msgspec.DecodeError as error:
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


def decode_rows(rows: Iterable[str | bytes], kind: type[AnyRow], where: str, strict: bool = False) -> list[AnyRow]:
    decoded = []
    for number, row in enumerate(rows, 1):
        try:
            item = msgspec.json.decode(row, type=kind)
            if item.schema > SCHEMA:
                raise msgspec.ValidationError(f"schema {item.schema} is newer than {SCHEMA}")
            decoded.append(item)
        except msgspec.DecodeError as error:
            message = f"{where}: {kind.__name__} number {number} cannot be read ({error})"
            if strict:
                raise RecordError(f"{message}; mend or remove it first") from error
            warn_once(f"{message}; it is skipped")
    return decoded
