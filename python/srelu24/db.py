"""The tuning database: which configuration is best for a problem on a GPU, and the evidence for it.

Two stores are read together. *Shipped* records are text files under review, ``tuning_db/<arch>/<gpu>/<family>.json``.
The *user's* store is one SQLite file; besides records it keeps every trial the tuner ever made, failures included.
The user's record wins over the shipped one for the same problem and GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec

from srelu24.user_store import UserStore, warn_once
from srelu24_gen import paths, space
from srelu24_gen.errors import RecordError, Unsupported
from srelu24_gen.spec import Family, KernelConfig, Problem
from srelu24_gen.target import GpuTarget

SCHEMA = 1
"""Version of the record and trial fields, in shipped files and in the user's store."""

Size = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Row = TypeVar("Row", bound="_Row")


class Evidence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a record rests on. Times are medians in milliseconds, interleaved with the default in one process."""

    ms: Positive
    default_ms: Positive
    """The default configuration, in the same rounds."""
    pair_ms: Positive | None = None
    """GEMM1 and GEMM2 chained, each with its winner; None where no pair was timed."""
    pair_default_ms: Positive | None = None
    dense_ms: Positive | None = None
    """Our dense GEMM of the same sizes in the same rounds; None where it was not asked for."""
    pair_dense_ms: Positive | None = None
    """Both dense GEMMs chained, in the rounds of ``pair_ms``."""
    samples: Annotated[int, msgspec.Meta(ge=1)]
    sm_mhz: float | None = None
    watts: float | None = None
    versions: dict[str, str] = {}
    source_digest: str
    """Key of the binary that was timed."""
    when: str
    """UTC, as :func:`srelu24.user_store.now` writes it."""


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


class ChainStep(msgspec.Struct, frozen=True):
    """The second GEMM of a trial that timed a pair."""

    family: Family
    m: Size
    n: Size
    k: Size
    config: dict[str, Any]


class Trial(_Row, frozen=True, kw_only=True, omit_defaults=True):
    """One configuration tried once: a time, or the reason why there is none."""

    stage: Literal["screen", "refine", "pair"]
    outcome: Literal["ok", "failed"]
    reason: str = ""
    ms: Positive | None = None
    speedup: Positive | None = None
    """Default time / this time, median over paired rounds: comparable between runs, unlike ``ms``."""
    samples: int = 0
    sm_mhz: float | None = None
    watts: float | None = None
    source_digest: str = ""
    when: str = ""
    then: ChainStep | None = None
    """Set for a pair: the GEMM that consumed this one's output."""


@dataclass(frozen=True, slots=True)
class Match:
    """A record that answers a problem, its parsed configuration, and how near it is."""

    record: TuningRecord
    how: Literal["exact", "nearest", "other_gpu"]
    config: KernelConfig


def distance(a: Problem, b: Problem) -> float:
    """How unlike two sizes are: sum of |log ratio| of N and K, and half of M's (one binary serves any M)."""

    def log_ratio(x: int, y: int) -> float:
        return abs(math.log(max(x, 1) / max(y, 1)))

    return log_ratio(a.m, b.m) / 2 + log_ratio(a.n, b.n) + log_ratio(a.k, b.k)


class Database:
    """Shipped records and the user's store, read as one. Safe to use from many threads and processes."""

    def __init__(self, shipped: Path, user: Path) -> None:
        self.shipped_folder = shipped
        self.user_file = user
        self._store = UserStore(user)
        self._shipped: list[TuningRecord] | None = None
        self._user: tuple[object, list[TuningRecord]] = (None, [])

    @classmethod
    def open(cls, shipped: Path | None = None, user: Path | None = None) -> Self:
        """The database at its usual places, or at those given. Creates nothing before the first write."""
        return cls(shipped or paths.shipped_records_dir(), user or paths.data_dir() / "tuning.sqlite")

    def records(self) -> list[TuningRecord]:
        """All records, sorted; of two for the same problem and GPU only the user's."""
        found = {r.key: r for r in (*self.shipped_records(), *self.user_records())}
        return [found[key] for key in sorted(found)]

    def shipped_records(self) -> list[TuningRecord]:
        """The records that came with the package. A damaged file is skipped with a warning."""
        if self._shipped is None:
            self._shipped = []
            for file in sorted(self.shipped_folder.glob("*/*/*.json")):
                try:
                    self._shipped += _read_file(file)
                except RecordError as error:
                    warn_once(str(error))
        return self._shipped

    def user_records(self) -> list[TuningRecord]:
        """The records of the user's own store."""
        rows = self._store.read("SELECT json FROM records ORDER BY arch, gpu, family, m, n, k")
        return _decode_rows(rows, TuningRecord, str(self.user_file))

    def _user_records_cached(self) -> list[TuningRecord]:
        """The user's records, read again only after their file has changed: the dispatcher asks for every new M."""
        stamp = self._store.stamp()
        if stamp != self._user[0]:
            self._user = (stamp, self.user_records())
        return self._user[1]

    def find(self, problem: Problem, target: GpuTarget) -> Match | None:
        """The best answer for a problem on a GPU.

        In this order: the same family and sizes on this GPU (the user's record first), the nearest sizes on this GPU
        (:func:`distance`), the nearest on another GPU of the same architecture. Families that differ only by bias,
        residual or non-zero count answer for each other, never as "exact". Only a configuration that
        ``space.supports()`` accepts for this very problem is returned; a record this version cannot parse is skipped
        with a warning that names it.
        """
        ranked: list[tuple[tuple[Any, ...], TuningRecord, Literal["exact", "nearest", "other_gpu"]]] = []
        for source, records in enumerate((self._user_records_cached(), self.shipped_records())):
            for record in records:
                if record.arch != target.arch or not _related(record.family, problem.family):
                    continue
                apart = distance(record.problem, problem)
                differences = _option_differences(record.family, problem.family)
                if record.gpu != target.key:
                    how: Literal["exact", "nearest", "other_gpu"] = "other_gpu"
                elif str(record.problem) == str(problem):
                    how = "exact"
                else:
                    how = "nearest"
                rank = (("exact", "nearest", "other_gpu").index(how), apart, differences, source, record.key)
                ranked.append((rank, record, how))
        for _, record, how in sorted(ranked, key=lambda entry: entry[0]):
            try:
                config = record.kernel_config()
            except Unsupported as error:
                warn_once(f"the tuning record for {record} is skipped: {error}")
                continue
            if space.supports(problem, config, target).ok:
                return Match(record, how, config)
        return None

    def put(self, record: TuningRecord) -> None:
        """Store a record for the user; it replaces the one of the same problem and GPU.

        Raises:
            RecordError: the record breaks its own schema, or the store cannot be written.
        """
        self._store.write([_insert_record(record)])

    def add_trial(self, *trials: Trial) -> None:
        """Append trials, all or none; they are on disk when this returns. Raises RecordError as :meth:`put` does."""
        self._store.write([_insert("trials", trial) for trial in trials])

    def drop(self, rows: Iterable[TuningRecord | Trial]) -> int:
        """Delete rows from the user's store, all or none; returns how many.

        A row that is no longer as it is given, because someone stored a newer one, stays. Raises RecordError as
        :meth:`put` does.
        """
        doomed = {msgspec.json.encode(row) for row in rows}
        statements = []
        for table, kind in (("records", TuningRecord), ("trials", Trial)):
            for text in self._store.read(f"SELECT json FROM {table}"):
                with contextlib.suppress(msgspec.DecodeError):
                    row = msgspec.json.decode(text, type=kind)
                    if msgspec.json.encode(row) in doomed:
                        where = "arch=? AND gpu=? AND family=? AND m=? AND n=? AND k=? AND json=?"
                        statements.append((f"DELETE FROM {table} WHERE {where}", (*row.key, text)))
        if statements:
            self._store.write(statements)
        return len(statements)

    def all_trials(self) -> list[Trial]:
        """Every trial in the user's store, oldest first."""
        return _decode_rows(self._store.read("SELECT json FROM trials ORDER BY id"), Trial, str(self.user_file))

    def trials(self, problem: Problem, target: GpuTarget) -> list[Trial]:
        """Every trial of this very problem on this GPU, oldest first."""
        where = (target.arch, target.key, problem.family.name, problem.m, problem.n, problem.k)
        rows = self._store.read(
            "SELECT json FROM trials WHERE arch=? AND gpu=? AND family=? AND m=? AND n=? AND k=? ORDER BY id", where
        )
        return _decode_rows(rows, Trial, str(self.user_file))

    def export(self, path: Path | str) -> int:
        """Write the user's records as reviewable text; returns how many.

        A path that ends in ``.json`` becomes one file with these records only; any other path is a folder in the
        layout of ``tuning_db``, whose records for other problems and GPUs are kept. Raises RecordError where a file
        already there cannot be read: nothing in it is overwritten.
        """
        path, records = Path(path), self.user_records()
        if path.suffix == ".json":
            _write_file(path, records)
            return len(records)
        files: dict[Path, list[TuningRecord]] = {}
        for record in records:
            files.setdefault(path / record.arch / record.gpu / f"{record.family.name}.json", []).append(record)
        merged = {}
        for file, new in files.items():
            old = _read_file(file, strict=True) if file.exists() else []
            merged[file] = list({r.key: r for r in (*old, *new)}.values())
        for file, both in merged.items():
            _write_file(file, both)
        self._shipped = None
        return len(records)

    def import_(self, path: Path | str) -> int:
        """Take records from a file or folder that :meth:`export` wrote into the user's store; returns how many.

        A record the user has already is replaced only by a newer one. Raises RecordError for a file that is not ours.
        """
        when = {r.key: r.evidence.when for r in self.user_records()}
        new = [r for r in read_records(path) if r.evidence.when > when.get(r.key, "")]
        if new:
            self._store.write([_insert_record(r) for r in new])
        return len(new)


def read_records(path: Path | str) -> list[TuningRecord]:
    """Records of a file or folder that :meth:`Database.export` wrote; RecordError for anything else."""
    path = Path(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise RecordError(f"{path} holds no tuning records; give a file or folder that `srelu24 db export` wrote")
    return [record for file in files for record in _read_file(file)]


def _related(a: Family, b: Family) -> bool:
    return (a.op, a.dtype) == (b.op, b.dtype) and (a.activation == b.activation or a.name == b.name)


def _option_differences(a: Family, b: Family) -> int:
    return sum(getattr(a, name) != getattr(b, name) for name in ("bias", "residual", "count_nonzeros"))


class _File(msgspec.Struct):
    schema: int
    records: list[msgspec.Raw]


def _read_file(file: Path, strict: bool = False) -> list[TuningRecord]:
    """Records of one file. A single bad record is skipped with a warning, or an error where `strict`."""
    try:
        content = msgspec.json.decode(file.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError) as error:
        raise RecordError(f"{file} is not a tuning record file ({error}); restore it or delete it") from error
    if content.schema != SCHEMA:
        raise RecordError(f"{file} has schema {content.schema}, this version reads {SCHEMA}; update srelu24")
    return _decode_rows([bytes(raw) for raw in content.records], TuningRecord, str(file), strict)


def _write_file(file: Path, records: Iterable[TuningRecord]) -> None:
    """Sorted and indented, so that a review shows what changed; a reader sees the old file or the new one."""
    content = {"schema": SCHEMA, "records": [msgspec.to_builtins(r) for r in sorted(records, key=lambda r: r.key)]}
    partial: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(handle, "w") as stream:
            json.dump(content, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except OSError as error:
        if partial:
            Path(partial).unlink(missing_ok=True)
        raise RecordError(f"{file} cannot be written ({error}); choose another path") from error


def _decode_rows(rows: Iterable[str | bytes], kind: type[Row], where: str, strict: bool = False) -> list[Row]:
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


def _insert(table: Literal["records", "trials"], row: _Row) -> tuple[str, tuple[Any, ...]]:
    """The statement that stores a row, checked by reading it back: what is stored can be read."""
    encoded = msgspec.json.encode(row).decode()
    try:
        if msgspec.json.decode(encoded, type=type(row)) != row:
            raise msgspec.ValidationError("it does not read back as it was written")
    except msgspec.DecodeError as error:
        raise RecordError(f"the {type(row).__name__} for {row} is not valid ({error}); nothing was stored") from error
    verb = "INSERT OR REPLACE" if table == "records" else "INSERT"
    return f"{verb} INTO {table} (arch, gpu, family, m, n, k, json) VALUES (?, ?, ?, ?, ?, ?, ?)", (*row.key, encoded)


def _insert_record(record: TuningRecord) -> tuple[str, tuple[Any, ...]]:
    try:
        record.kernel_config()
    except Unsupported as error:
        raise RecordError(f"the tuning record for {record} cannot be stored: {error}") from error
    return _insert("records", record)
