"""The user's tuning store: one SQLite file that many processes may write at once and any of them may die in.

A damaged or foreign file is set aside and named in a warning, never overwritten; a newer one is left alone. One in a
folder that cannot be written, such as that of an image, is read as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import stat
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from srelu24_gen.errors import RecordError

_APPLICATION_ID = 0x53524C32
"""Marks a SQLite file as ours (``PRAGMA application_id``): "SRL2"."""

_MIGRATIONS = (
    """
    CREATE TABLE records (arch TEXT, gpu TEXT, family TEXT, m INTEGER, n INTEGER, k INTEGER, json TEXT NOT NULL,
                          PRIMARY KEY (arch, gpu, family, m, n, k)) WITHOUT ROWID;
    CREATE TABLE trials (id INTEGER PRIMARY KEY, arch TEXT, gpu TEXT, family TEXT, m INTEGER, n INTEGER, k INTEGER,
                         json TEXT NOT NULL);
    CREATE INDEX trials_by_problem ON trials (arch, gpu, family, m, n, k);
    """,
)
"""Entry i takes the tables from ``user_version`` i to i + 1. Append; never edit."""


_NO_WRITING = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM)
"""What SQLite says where it cannot make the files beside the store that it needs to read it."""
_COLUMNS = {"records": "arch, gpu, family, m, n, k, json", "trials": "id, arch, gpu, family, m, n, k, json"}
_ATTEMPTS = 5
"""How often a write begins anew when the file is damaged or vanishes under it."""


class _Damaged(Exception):
    """The file is not a healthy store of ours."""


@dataclass
class UserStore:
    """A SQLite file in WAL mode, opened anew for every operation.

    Nothing is held between operations, so threads, forks and kills have nothing to break; the tuner writes a few rows
    a second and the dispatcher caches its answers.
    """

    path: Path
    busy_seconds: float = 30.0
    _checked: bool = field(default=False, init=False)

    def read(self, query: str, arguments: tuple[Any, ...] = ()) -> list[bytes | Any]:
        """First column of a query, text as bytes; nothing where the store is missing, unreadable, damaged or newer."""
        try:
            try:
                if not self._there():
                    return []
                with self._open() as (connection, version):
                    if version > len(_MIGRATIONS):
                        warn_once(f"{self._newer(version)} and is ignored; update srelu24 to use it")
                        return []
                    return [row[0] for row in connection.execute(query, arguments)]
            except _Damaged as reason:
                self._set_aside(str(reason))
        except (OSError, sqlite3.Error, NotImplementedError) as error:
            warn_once(
                f"the tuning store {self.path} cannot be read ({error}) and is ignored; check its permissions, or set"
                " SRELU24_DATA_DIR to another folder"
            )
        return []

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever another process may have written: time and size of the file and of its log."""
        found = []
        for path in (self.path, Path(f"{self.path}-wal")):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size))
        return tuple(found)

    def write(self, statements: list[tuple[str, tuple[Any, ...]]]) -> None:
        """Run the statements as one transaction, creating or migrating the store first; RecordError if that fails."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_ATTEMPTS):
                try:
                    return self._transact(statements)
                except _Damaged as reason:
                    self._set_aside(str(reason))
                except sqlite3.OperationalError as error:
                    if "unable to open" not in str(error):
                        raise
                    time.sleep(0.02)  # another process has just set the file aside: it will be made anew
            self._transact(statements)
        except (OSError, sqlite3.Error, _Damaged, NotImplementedError) as error:
            raise RecordError(
                f"the tuning store {self.path} cannot be written ({error}); "
                "free space or permissions there, or set SRELU24_DATA_DIR to another folder"
            ) from error

    def _transact(self, statements: list[tuple[str, tuple[Any, ...]]]) -> None:
        if not self._there():
            self._create()
        with self._open() as (connection, version):
            if version > len(_MIGRATIONS):
                raise RecordError(f"{self._newer(version)}; update srelu24 or set SRELU24_DATA_DIR to another folder")
            connection.execute("BEGIN IMMEDIATE")
            _migrate(connection)
            for statement, arguments in statements:
                connection.execute(statement, arguments)
            connection.execute("COMMIT")

    def _create(self) -> None:
        """Make the store under another name and rename it into place: no process ever sees half of one."""
        with self._lock():
            if self._there():
                return
            self._move(_unused(f"{self.path}.orphan"))  # a log without its file would be replayed into ours
            fresh = Path(f"{self.path}.new")
            fresh.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("BEGIN IMMEDIATE")
                _migrate(connection)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute("COMMIT")
            os.rename(fresh, self.path)

    def _there(self) -> bool:
        """Whether there is a store. Raises OSError where that cannot be known."""
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        return True

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """A connection and the store's schema version; raises _Damaged for what is not a healthy store of ours."""
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.text_factory = bytes  # what is no UTF-8 is for the reader of the row to refuse
                if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                    raise _Damaged("it is empty or another program's database")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if not self._checked and version <= len(_MIGRATIONS):
                    _check(connection, version)
                    self._checked = True
                yield connection, version
        except UnicodeDecodeError as error:  # SQLite repeats what it cannot parse
            raise _Damaged("the definitions of its tables are no text") from error
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise _Damaged(str(error)) from error
            raise

    def _connect(self) -> sqlite3.Connection:
        """For reading and writing; for reading alone where the folder cannot be written: a log is read from its memory
        beside the file, and what no log can be read of is complete in itself."""
        failure: sqlite3.Error | None = None
        for mode in ("mode=rw", "mode=ro", "mode=ro&immutable=1"):  # rw, not rwc: never create
            uri = f"{self.path.absolute().as_uri()}?{mode}"
            connection = sqlite3.connect(uri, uri=True, timeout=self.busy_seconds, isolation_level=None)
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                return connection
            except sqlite3.OperationalError as error:
                connection.close()
                failure = failure or error
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                if code not in _NO_WRITING or os.access(self.path.parent, os.W_OK):
                    raise
            except BaseException:
                connection.close()
                raise
        assert failure is not None
        raise failure

    def _set_aside(self, reason: str) -> None:
        """Rename the damaged file, with its log, so that nothing is lost and the next write starts afresh."""
        with self._lock():
            self._checked = False
            try:  # another process may have done this while we waited for the lock
                if not self._there():
                    return
                with self._open():
                    return
            except _Damaged:
                aside = _unused(f"{self.path}.corrupt-{now().replace(':', '')}")
                self._move(aside)
            except sqlite3.OperationalError:
                return
        warn_once(
            f"the tuning store {self.path} is damaged ({reason}); it was set aside as {aside} and a new one is used"
        )

    def _move(self, aside: str) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")

    def _newer(self, version: int) -> str:
        return (
            f"the tuning store {self.path} was written by a newer srelu24 "
            f"(schema {version}, this version knows {len(_MIGRATIONS)})"
        )

    def _lock(self) -> FileLock:
        return FileLock(f"{self.path}.lock", timeout=self.busy_seconds)


def _check(connection: sqlite3.Connection, version: int) -> None:
    """Raises _Damaged where the file's structure is, and where a flipped bit has renamed or undone what we made."""
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != b"ok":
        raise _Damaged(str(verdict, "utf-8", "replace"))
    if version < 1:
        raise _Damaged(f"its schema version is {version}")
    for table, columns in _COLUMNS.items():
        try:
            connection.execute(f"SELECT {columns} FROM {table} LIMIT 0")
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:
                raise _Damaged(str(error)) from error
            raise


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables up to date inside the caller's transaction."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for number in range(version, len(_MIGRATIONS)):
        for statement in _MIGRATIONS[number].split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number + 1}")


def _unused(name: str) -> str:
    """The name, or the first of name-1, name-2, ... that is free: nothing set aside before is overwritten."""
    numbered = (f"{name}-{i}" if i else name for i in itertools.count())
    return next(n for n in numbered if not any(os.path.exists(n + suffix) for suffix in ("", "-wal", "-shm")))


def now() -> str:
    """The time of evidence: UTC to the second, sortable as text."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, once per process and message: databases are opened often and read on the way to a launch."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
