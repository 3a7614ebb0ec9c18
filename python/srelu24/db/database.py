"""The tuning database: which configuration is best for a problem on a GPU, and the evidence for it.

Two stores are read together. *Shipped* records are text files under review, ``tuning_db/<arch>/<gpu>/<family>.json``.
The *user's* store is one SQLite file; besides records it keeps every trial the tuner ever made, failures included.
The user's record wins over the shipped one for the same problem and GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from srelu24.db.records import Trial, TuningRecord, decode_row, decode_rows, read_file, read_records, write_file
from srelu24.db.store import UserStore, warn_once
from srelu24_gen import paths, space, untrusted
from srelu24_gen.errors import RecordError, Unsupported
from srelu24_gen.spec import Family, KernelConfig, Problem
from srelu24_gen.target import GpuTarget


@dataclass(frozen=True, slots=True)
class Match:
    """A record that answers a problem, its parsed configuration, and how near it is."""

    record: TuningRecord
    how: Literal["exact", "nearest", "other_gpu"]
    config: KernelConfig


_EXACT, _NEAREST, _OTHER_GPU = range(3)
_HOW: tuple[Literal["exact", "nearest", "other_gpu"], ...] = ("exact", "nearest", "other_gpu")


_OTHER_SHAPE = math.log(2)
"""Distance of kernels of which one packs, reads or stores in another order, as in training: four times the tokens."""


def distance(a: Problem, b: Problem) -> float:
    """How unlike two problems are: sum of |log ratio| of the widths and half of the tokens' (one binary serves any
    number), and a constant where the kernels walk memory differently. Rounded, so that what is equally far is equal."""

    def log_ratio(x: int, y: int) -> float:
        return abs(math.log(max(x, 1) / max(y, 1)))

    sizes = log_ratio(a.tokens, b.tokens) / 2 + sum(map(log_ratio, a.widths, b.widths))
    return round(sizes + _OTHER_SHAPE * (_walk(a.family) != _walk(b.family)), 9)


class Database:
    """Shipped records and the user's store, read as one. Safe to use from many threads and processes."""

    def __init__(self, shipped: Path, user: Path) -> None:
        self.shipped_folder = shipped
        self.user_file = user
        self._store = UserStore(user)
        self._shipped: list[TuningRecord] | None = None
        self._user: tuple[object, list[TuningRecord]] = (None, [])
        self._kinds: tuple[object, object, dict[object, list[tuple[int, TuningRecord]]]] = (None, None, {})

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
        records = self._shipped
        if records is None:
            records = []
            for file in sorted(self.shipped_folder.glob("*/*/*.json")):
                try:
                    records += read_file(file)
                except RecordError as error:
                    warn_once(str(error))
            self._shipped = records  # whole: another thread may ask in the meantime
        return records

    def user_records(self) -> list[TuningRecord]:
        """The records of the user's own store."""
        rows = self._store.read("SELECT json FROM records ORDER BY arch, gpu, family, m, n, k")
        return decode_rows(rows, TuningRecord, str(self.user_file))

    def _user_records_cached(self) -> list[TuningRecord]:
        """The user's records, read again only after their file has changed: the dispatcher asks for every new M."""
        stamp, kept = self._store.stamp(), self._user
        if stamp != kept[0]:
            kept = self._user = (stamp, self.user_records())
        return kept[1]

    def find(self, problem: Problem, target: GpuTarget) -> Match | None:
        """The best answer for a problem on a GPU.

        In this order: the same family and sizes on this GPU (the user's record first), the nearest sizes on this GPU
        (:func:`distance`), the nearest on another GPU of the same architecture. Families that differ only by options,
        such as a bias or bf16 and fp16, answer for each other, never as "exact". Only a configuration that
        ``space.supports()`` accepts for this very problem is returned; a record this version cannot parse is skipped
        with a warning that names it.
        """
        ranked = []
        for place, (_, record) in enumerate(self._of_kind(target.arch, problem.family)):
            if record.gpu != target.key:
                how = _OTHER_GPU
            elif (record.m, record.n, record.k) == (problem.m, problem.n, problem.k) and (
                record.family == problem.family or record.family.name == problem.family.name
            ):
                how = _EXACT
            else:
                how = _NEAREST
            apart = distance(record.problem, problem)
            ranked.append((how, apart, _option_differences(record.family, problem.family), place, record))
        for how, *_, record in sorted(ranked, key=lambda entry: entry[:-1]):  # places: the user's come first
            try:
                config = record.kernel_config()
            except Unsupported as error:
                warn_once(f"the tuning record for {record} is skipped: {error}")
                continue
            if space.supports(problem, config, target).ok:
                return Match(record, _HOW[how], config)
        return None

    def _of_kind(self, arch: str, family: Family) -> list[tuple[int, TuningRecord]]:
        """Records that may answer for a family, the user's with 0 and the shipped with 1: kept until one is written."""
        user, shipped = self._user_records_cached(), self.shipped_records()
        kept = self._kinds
        if kept[0] is not user or kept[1] is not shipped:
            kept = self._kinds = (user, shipped, {})
        kinds = kept[2]  # of these very records, whatever another thread has put in their place
        key = (arch, family.op, family.dtype, family.activation)
        if key not in kinds:
            kinds[key] = [
                (source, record)
                for source, records in enumerate((user, shipped))
                for record in records
                if record.arch == arch and _related(record.family, family)
            ]
        return kinds[key]

    def of_widths(self, problem: Problem, target: GpuTarget) -> list[TuningRecord]:
        """Records of this GPU for the same widths at any number of tokens, sorted by that; of one number the nearest
        family's, the user's own first."""
        found: dict[int, tuple[tuple[int, int], TuningRecord]] = {}
        for source, record in self._of_kind(target.arch, problem.family):
            recorded = record.problem
            if (record.gpu, recorded.widths) == (target.key, problem.widths):
                rank = (_option_differences(record.family, problem.family), source)
                if recorded.tokens not in found or rank < found[recorded.tokens][0]:
                    found[recorded.tokens] = (rank, record)
        return [found[tokens][1] for tokens in sorted(found)]

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
                with contextlib.suppress(untrusted.Undecodable):
                    row = decode_row(text, kind)
                    if msgspec.json.encode(row) in doomed:
                        where = "arch=? AND gpu=? AND family=? AND m=? AND n=? AND k=? AND json=?"
                        statements.append((f"DELETE FROM {table} WHERE {where}", (*row.key, str(text, "utf-8"))))
        if statements:
            self._store.write(statements)
        return len(statements)

    def all_trials(self) -> list[Trial]:
        """Every trial in the user's store, oldest first."""
        return decode_rows(self._store.read("SELECT json FROM trials ORDER BY id"), Trial, str(self.user_file))

    def trials(self, problem: Problem, target: GpuTarget) -> list[Trial]:
        """Every trial of this very problem on this GPU, oldest first."""
        where = (target.arch, target.key, problem.family.name, problem.m, problem.n, problem.k)
        rows = self._store.read(
            "SELECT json FROM trials WHERE arch=? AND gpu=? AND family=? AND m=? AND n=? AND k=? ORDER BY id", where
        )
        return decode_rows(rows, Trial, str(self.user_file))

    def export(self, path: Path | str) -> int:
        """Write the user's records as reviewable text; returns how many.

        A path that ends in ``.json`` becomes one file with these records only; any other path is a folder in the
        layout of ``tuning_db``, whose records for other problems and GPUs are kept. Raises RecordError where a file
        already there cannot be read: nothing in it is overwritten.
        """
        path, records = Path(path), self.user_records()
        if path.suffix == ".json":
            write_file(path, records)
            return len(records)
        files: dict[Path, list[TuningRecord]] = {}
        for record in records:
            files.setdefault(path / record.arch / record.gpu / f"{record.family.name}.json", []).append(record)
        merged = {}
        for file, new in files.items():
            old = read_file(file, strict=True) if file.exists() else []
            merged[file] = list({r.key: r for r in (*old, *new)}.values())
        for file, both in merged.items():
            write_file(file, both)
        self._shipped = None
        return len(records)

    def import_(self, path: Path | str) -> int:
        """Take records from a file or folder that :meth:`export` wrote into the user's store; returns how many.

        A record the user has already is replaced only by a newer one. Raises RecordError for a file that is not ours.
        """
        return self.take(read_records(path))

    def take(self, records: Iterable[TuningRecord]) -> int:
        """Store records of others, all or none, except where the user has a newer one; returns how many were taken."""
        # Text of this form sorts as time. What says that it is of the future says nothing, and is older than all else.
        latest = f"{date.today() + timedelta(days=2)}"

        def when(record: TuningRecord) -> str:
            return record.evidence.when if record.evidence.when < latest else ""

        known = {r.key: when(r) for r in self.user_records()}
        new = [r for r in records if r.key not in known or when(r) > known[r.key]]
        if new:
            self._store.write([_insert_record(r) for r in new])
        return len(new)


def _related(a: Family, b: Family) -> bool:
    """Whether records of one may answer for the other: the same kernel but for options, the 16-bit type, and which
    activation it applies."""
    alike = a.op == b.op or (a.op.prunes and b.op.prunes)
    return alike and a.dtype.bytes == b.dtype.bytes and (a.activates == b.activates or a.name == b.name)


def _option_differences(a: Family, b: Family) -> int:
    options = (f.name for f in dataclasses.fields(Family) if f.name != "op")
    return sum(getattr(a, name) != getattr(b, name) for name in options)


def _walk(family: Family) -> tuple[bool, bool, bool]:
    """What decides in which order a kernel reads and stores."""
    return family.tokens, family.permuted, family.transposed


def _insert(table: Literal["records", "trials"], row: TuningRecord | Trial) -> tuple[str, tuple[Any, ...]]:
    """The statement that stores a row, checked by reading it back: what is stored can be read."""
    try:
        encoded = msgspec.json.encode(row).decode()
        if decode_row(encoded, type(row)) != row:
            raise untrusted.Undecodable("it does not read back as it was written")
    except (untrusted.Undecodable, UnicodeError) as error:  # text of other encodings has halves of characters in it
        raise RecordError(f"the {type(row).__name__} for {row} is not valid ({error}); nothing was stored") from error
    verb = "INSERT OR REPLACE" if table == "records" else "INSERT"
    return f"{verb} INTO {table} (arch, gpu, family, m, n, k, json) VALUES (?, ?, ?, ?, ?, ?, ?)", (*row.key, encoded)


def _insert_record(record: TuningRecord) -> tuple[str, tuple[Any, ...]]:
    try:
        record.kernel_config()
    except Unsupported as error:
        raise RecordError(f"the tuning record for {record} cannot be stored: {error}") from error
    return _insert("records", record)
