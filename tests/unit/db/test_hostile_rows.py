"""Rows and stores that others may have written, or a disk has damaged: skipped with a warning, and all else goes on."""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from command_line import srelu24
from rows import CONFIG, H200, PROBLEM, evidence, record, ship, trial
from srelu24.db import database as db_module
from srelu24.db import fit, store
from srelu24.db.database import Database
from srelu24.db.records import DENSE_WAYS, DenseTime, Trial, TuningRecord, decode_row, encode_file, read_file
from srelu24.runtime import dense
from srelu24_gen import untrusted
from srelu24_gen.errors import RecordError

NOBODY = 65534


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    store._warned.clear()


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "shipped", tmp_path / "user" / "tuning.sqlite")


def changed(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(row: dict[str, Any]) -> None:
        place = row
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to

    return change


TIME = {"ms": 1.0, "speedup": 1.0, "low": 1.0}
BAD: dict[str, Callable[[dict[str, Any]], None]] = {
    "m of 2^63": changed("m", to=2**63),
    "m beyond what kernels count": changed("m", to=2**31),
    "negative n": changed("n", to=-1),
    "tile -64": changed("config", "tile_m", to=-64),
    "no stages": changed("config", "stages", to=0),
    "stages of 10^9": changed("config", "stages", to=10**9),
    "a tile of text": changed("config", "tile_m", to="128"),
    "an unknown field of the configuration": changed("config", "tile_q", to=1),
    "an unknown producer": changed("config", "producer", to="magic"),
    "an unknown dtype": changed("family", "dtype", to="fp4"),
    "an unknown op": changed("family", "op", to="conv"),
    "a newer option of the family": changed("family", "gated", to=True),
    "an arch that is a path": changed("arch", to="../../x"),
    "a GPU that is a path": changed("gpu", to="../h200"),
    "a GPU with markup": changed("gpu", to="[red]h200[/red]"),
    "a GPU with a line break": changed("gpu", to="h200\n"),
    "no GPU": changed("gpu", to=""),
    "a date in words": changed("evidence", "when", to="yesterday"),
    "a date of the year 9999": changed("evidence", "when", to="9999-01-01T00:00:00Z"),
    "a 31st of February": changed("evidence", "when", to="2026-02-31T00:00:00Z"),
    "a dense way that does not exist": changed("evidence", "dense", to={"magic": TIME}),
    "a time of nothing": changed("evidence", "ms", to=0),
    "a time of infinity": changed("evidence", "ms", to=1e300),
    "a newer schema": changed("schema", to=2),
    "a density above 1": changed("density", to=1.1),
    "a digest without end": changed("evidence", "source_digest", to="x" * 10**5),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_refused_where_it_is_read_and_nowhere_else(what: str, db: Database, tmp_path: Path) -> None:
    row = json.loads(msgspec.json.encode(record(m=64)))
    decode_row(json.dumps(row), TuningRecord)
    BAD[what](row)
    text = json.dumps(row)
    with pytest.raises(untrusted.Undecodable):
        decode_row(text, TuningRecord)
    db.put(record())
    with sqlite3.connect(db.user_file) as connection:
        connection.execute("INSERT INTO records VALUES ('sm_90a', 'h200', 'x', 1, 2, 3, ?)", (text,))
    connection.close()
    with pytest.warns(RuntimeWarning, match=r"TuningRecord number \d cannot be read .*skipped"):
        assert db.records() == [record()]
    file = tmp_path / "records.json"
    file.write_text(f'{{"schema": 1, "records": [{text}, {msgspec.json.encode(record()).decode()}]}}')
    with pytest.warns(RuntimeWarning, match="number 1 cannot be read"):
        assert read_file(file) == [record()]
    with pytest.raises(RecordError, match="mend or remove it first"):
        read_file(file, strict=True)
    assert db.export(tmp_path / "out") == 1
    assert [str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.json")] == [
        "sm_90a/h200/spgemm_bf16.json"
    ]


def test_a_newer_option_in_a_chain_is_refused_too() -> None:
    row = json.loads(msgspec.json.encode(trial()))
    step = {"family": row["family"], "m": 1, "n": 1, "k": 1, "config": row["config"]}
    row["then"] = {**step, "then": step}
    decode_row(json.dumps(row), Trial)
    for change in (changed("family", to={**row["family"], "gated": True}), changed("config", to={"stages": -1})):
        bad = json.loads(json.dumps(row))
        change(bad["then"]["then"])
        with pytest.raises(untrusted.Undecodable):
            decode_row(json.dumps(bad), Trial)


def test_dense_ways_are_those_of_the_dispatcher() -> None:
    assert tuple(dense.WAYS) == DENSE_WAYS
    known = record(evidence=evidence(dense={way: DenseTime(1.0, 1.0, 1.0) for way in DENSE_WAYS}))
    assert decode_row(msgspec.json.encode(known), TuningRecord) == known


def test_a_record_of_the_future_keeps_nobody_out(db: Database) -> None:
    future, today = record(evidence=evidence(when="2099-01-01T00:00:00Z")), record(evidence=evidence(ms=0.5))
    assert db.take([future]) == 1, "better than none"
    assert db.take([today]) == 1
    assert db.take([future]) == 0
    assert db.records() == [today]


@pytest.mark.parametrize("value", [b"\xff\xfe{", 7, 1.5, None, b"[" * 10**5, "", b"{" + b'"a":{' * 10**5])
def test_whatever_stands_in_a_row_leaves_the_others(db: Database, value: object) -> None:
    db.put(record())
    db.add_trial(trial(1))
    with sqlite3.connect(db.user_file) as connection:
        connection.executescript(
            "CREATE TABLE r2 AS SELECT * FROM records; DROP TABLE records; ALTER TABLE r2 RENAME TO records;"
        )
        connection.execute("INSERT INTO records VALUES ('sm_90a', 'h200', 'x', 1, 2, 3, ?)", (value,))
    connection.close()
    with pytest.warns(RuntimeWarning, match="number 2 cannot be read|number 1 cannot be read"):
        assert db.records() == [record()]
    assert db.find(PROBLEM, H200)
    assert db.drop([record()]) == 1
    assert db.all_trials() == [trial(1)]


@pytest.mark.parametrize(
    "damage",
    [
        "PRAGMA user_version = 0",
        "PRAGMA user_version = -2147483648",
        "ALTER TABLE trials RENAME TO trialz",
        "ALTER TABLE records RENAME COLUMN json TO jsoo",
        "DROP TABLE records",
        "PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = CAST(x'435245415445209fff' AS TEXT)",
    ],
)
def test_a_store_whose_tables_are_not_ours_is_set_aside(db: Database, damage: str) -> None:
    db.put(record())
    with sqlite3.connect(db.user_file) as connection:
        connection.executescript(damage)
    connection.close()
    db = Database.open(db.shipped_folder, db.user_file)
    with pytest.warns(RuntimeWarning, match="set aside as"):
        assert db.records() == []
    db.put(record())
    assert db.records() == [record()]


def as_nobody(work: Callable[[], object]) -> None:
    """Run in a process of a user without rights (root has all of them); what it raises fails the test."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A folder that every user can enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == Path.home().owner() and folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o755)
        if folder == Path("/tmp"):
            break
    return tmp_path


@pytest.mark.parametrize("log", [False, True])
def test_a_store_that_cannot_be_written_is_read(public: Path, log: bool) -> None:
    folder = public / "image"
    db = Database.open(public / "none", folder / "tuning.sqlite")
    db.put(record())
    db.add_trial(trial(1))
    if log:  # the image was made while a program had the store open
        holder = sqlite3.connect(db.user_file)
        holder.execute("SELECT * FROM records").fetchall()
        db.put(record(64))
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert record() in db.records(), db.records()
            assert db.all_trials() == [trial(1)]
            assert db.find(PROBLEM, H200)

    as_nobody(read)

    def write() -> None:
        with pytest.raises(RecordError, match="cannot be written"):
            db.put(record(2))

    as_nobody(write)
    folder.chmod(0o755)


def test_a_damaged_store_that_cannot_be_set_aside_is_ignored(public: Path) -> None:
    db = Database.open(public / "none", public / "image" / "tuning.sqlite")
    db.user_file.parent.mkdir()
    db.user_file.write_bytes(b"damaged" * 1000)
    db.user_file.parent.chmod(0o555)

    def read() -> None:
        with pytest.warns(RuntimeWarning, match="cannot be read"):
            assert db.records() == []

    as_nobody(read)
    db.user_file.parent.chmod(0o755)


def test_a_folder_that_cannot_be_entered_is_one_warning_and_the_shipped_records(public: Path) -> None:
    home = public / "home"
    db = Database.open(public / "shipped", home / "data" / "tuning.sqlite")
    ship(Database.open(public / "shipped", public / "elsewhere" / "tuning.sqlite"), [record()])
    db.put(record(64))
    home.chmod(0o700)
    if os.geteuid():
        home.chmod(0o000)

    def read() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert db.records() == [record()]
                assert db.find(PROBLEM, H200)
        assert len(caught) == 1, caught
        assert "Permission denied" in str(caught[0].message)
        with pytest.raises(RecordError, match="SRELU24_DATA_DIR"):
            db.put(record())

    as_nobody(read)
    home.chmod(0o700)


@pytest.mark.parametrize("name", ["n" * 300, "a/" * 3000, "pipe", "folder"])
def test_a_place_where_no_store_can_be_is_one_warning_or_none(tmp_path: Path, name: str) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / "pipe")
    if name == "folder":
        (tmp_path / "folder").mkdir()
    db = Database.open(tmp_path / "none", tmp_path / name)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert db.records() == []
    with pytest.raises(RecordError):
        db.put(record())


def test_text_that_no_file_can_hold_is_refused(db: Database) -> None:
    with pytest.raises(RecordError, match="is not valid"):
        db.put(record(evidence=evidence(versions={"driver": "\ud800"})))
    with pytest.raises(RecordError, match="is not valid"):
        db.put(record(m=2**70))


# --- commands


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 10**6, b'{"schema": 1, "records": [3]}', b'{"gpu": "h200"}'])
def test_no_file_of_records_or_trials_is_a_traceback(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(RecordError):
        fit.read(file)
    with pytest.raises(RecordError):
        read_file(file, strict=True)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "none"])
def test_what_is_no_file_is_not_waited_for(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))
    os.mkfifo("pipe")
    for command in (("db", "import", path), ("db", "diff", path), ("db", "fit", path, "--steps", "0")):
        said = srelu24(*command, code=1)
        assert said.stderr.startswith("error: ")
        assert said.stderr.count("\n") == 1


def test_a_newer_versions_rows_do_not_end_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(db_module.paths, "shipped_records_dir", lambda: tmp_path / "shipped")
    db = Database.open()
    db.put(record())
    newer = json.loads(msgspec.json.encode(record(64)))
    newer["config"]["consumers"] = 3
    with sqlite3.connect(db.user_file) as connection:
        connection.execute("INSERT INTO records VALUES ('sm_90a', 'h200', 'x', 1, 2, 3, ?)", (json.dumps(newer),))
    connection.close()
    said = srelu24("db", "list")
    assert "4096x4096x16384" in said.stdout
    assert "unknown field(s) consumers" in said.stderr


def test_an_export_of_many_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srelu24.db import records

    monkeypatch.setattr(records, "_MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.json").write_bytes(encode_file([record(config=CONFIG.to_dict())]))
    with pytest.raises(RecordError, match="more than 3 files"):
        records.read_records(tmp_path)
