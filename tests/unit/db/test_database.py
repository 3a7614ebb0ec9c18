"""The tuning database: round trips, the nearest record, many processes, and files that are not what they should be."""

from __future__ import annotations

import itertools
import json
import math
import os
import sqlite3
import warnings
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rows import CONFIG, H200, PROBLEM, evidence, record, ship, trial
from srelu24.db import database as db_module
from srelu24.db import store
from srelu24.db.database import Database
from srelu24.db.records import Evidence, TuningRecord
from srelu24_gen import space
from srelu24_gen.errors import RecordError
from srelu24_gen.space import MAX_EXTENT
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, Op, Producer


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    store._warned.clear()


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "shipped", tmp_path / "user" / "tuning.sqlite")


# --- round trips ---

sizes = st.integers(0, MAX_EXTENT)
times = st.floats(1e-3, 1e4)
families = st.sampled_from(
    [
        Family(Op.GEMM_RELU2_24, dtype, Activation.RELU2, bias, False, count)
        for dtype, bias, count in itertools.product(DType, (False, True), (False, True))
    ]
    + [
        Family(Op.SPGEMM, dtype, bias=bias, residual=r)
        for dtype, bias, r in itertools.product(DType, *[(False, True)] * 2)
    ]
)
configs = st.builds(
    KernelConfig,
    tile_m=st.sampled_from([m for m, _ in space.tiles(H200)]),
    stages=st.integers(2, 8),
    producer=st.sampled_from(Producer),
    raster_group=st.integers(1, 64),
)
evidences = st.builds(
    Evidence,
    ms=times,
    default_ms=times,
    pair_ms=st.none() | times,
    samples=st.integers(1, 1000),
    sm_mhz=st.none() | times,
    watts=st.none() | times,
    versions=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    source_digest=st.text(max_size=16),
    when=st.just("2026-01-01T00:00:00Z"),
)
records_strategy = st.builds(
    TuningRecord,
    family=families,
    m=sizes,
    n=sizes,
    k=sizes,
    arch=st.just("sm_90a"),
    gpu=st.sampled_from(["h200", "h100"]),
    config=configs.map(KernelConfig.to_dict),
    density=st.floats(0, 1),
    evidence=evidences,
)


@settings(max_examples=10)
@given(st.lists(records_strategy, max_size=5))
def test_records_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, written: list[TuningRecord]) -> None:
    folder = tmp_path_factory.mktemp("db")
    db = Database.open(folder / "shipped", folder / "a.sqlite")
    db._store.write([db_module._insert_record(each) for each in written])
    expected = {r.key: r for r in written}  # the last of one key stays
    assert {r.key: r for r in db.records()} == expected
    assert [r.key for r in db.records()] == sorted(expected)

    assert db.export(folder / "text") == db.export(folder / "all.json") == len(expected)
    for source in ("text", "all.json"):
        if not (folder / source).exists():
            assert not expected
            continue
        copy = Database.open(folder / "none", folder / f"{source}.sqlite")
        assert copy.import_(folder / source) == len(expected)
        assert {r.key: r for r in copy.user_records()} == expected
    shipped = Database.open(folder / "text", folder / "none.sqlite")
    assert {r.key: r for r in shipped.records()} == expected


def test_trials_come_back_oldest_first_and_only_those_of_the_problem(db: Database) -> None:
    written = [
        trial(i, outcome="failed", reason="hangs") if i % 2 else trial(i, ms=1.5, speedup=1.02) for i in range(5)
    ]
    for each in written:
        db.add_trial(each)
    db.add_trial(trial(9, m=1))
    db.add_trial(trial(9, gpu="h100"))
    assert db.trials(PROBLEM, H200) == written


def test_reading_creates_nothing(db: Database) -> None:
    assert db.records() == []
    assert db.trials(PROBLEM, H200) == []
    assert db.find(PROBLEM, H200) is None
    assert not db.user_file.parent.exists()


def test_exported_text_is_sorted_reviewable_and_kept_when_other_records_join(db: Database, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for m in (512, 64, 4096):
        db.put(record(m))
    db.export(out)
    other = Database.open(db.shipped_folder, tmp_path / "other.sqlite")
    other.put(record(64, evidence=evidence(ms=0.5)))
    other.put(record(128))
    other.export(out)
    (file,) = out.rglob("*.json")
    assert file.relative_to(out) == Path("sm_90a/h200/spgemm_bf16.json")
    content = json.loads(file.read_text())
    assert content["schema"] == 1
    assert [(r["m"], r["evidence"]["ms"]) for r in content["records"]] == [(64, 0.5), (128, 1), (512, 1), (4096, 1)]
    assert content["records"][0]["config"] == CONFIG.to_dict()
    assert len(file.read_text().splitlines()) > 40
    assert list(file.parent.iterdir()) == [file]


@settings(max_examples=15)
@given(st.lists(records_strategy, max_size=5), st.lists(st.integers(0, 3), max_size=6), st.data())
def test_drop_takes_the_rows_it_is_given_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, written: list[TuningRecord], samples: list[int], data: st.DataObject
) -> None:
    db = Database.open(user=tmp_path_factory.mktemp("db") / "tuning.sqlite")
    db._store.write([db_module._insert_record(each) for each in written])
    db.add_trial(*map(trial, samples))
    kept = {r.key: r for r in db.user_records()}
    doomed = data.draw(st.lists(st.sampled_from(list(kept.values())), unique_by=lambda r: r.key)) if kept else []
    doomed_samples = data.draw(st.sets(st.integers(0, 3)))
    count = db.drop([*doomed, *map(trial, doomed_samples)])
    assert count == len(doomed) + sum(s in doomed_samples for s in samples)  # equal trials go together
    for each in doomed:
        del kept[each.key]
    assert {r.key: r for r in db.user_records()} == kept
    assert [t.samples for t in db.all_trials()] == [s for s in samples if s not in doomed_samples]


def test_drop_leaves_a_record_that_was_replaced_meanwhile_and_what_it_cannot_read(db: Database) -> None:
    seen, newer = record(), record(evidence=evidence(ms=0.5))
    db.put(seen)
    db.put(newer)
    assert db.drop([seen]) == 0
    assert db.user_records() == [newer]
    with sqlite3.connect(db.user_file) as connection:
        connection.execute("UPDATE records SET json = 'damaged'")
    connection.close()
    assert db.drop([newer]) == 0
    with sqlite3.connect(db.user_file) as connection:
        assert connection.execute("SELECT json FROM records").fetchall() == [("damaged",)]
    connection.close()


def test_drop_on_a_store_that_is_not_there_creates_none(db: Database) -> None:
    assert db.drop([record()]) == 0
    assert not db.user_file.exists()


def test_export_does_not_overwrite_what_it_cannot_read(db: Database, tmp_path: Path) -> None:
    db.put(record())
    file = tmp_path / "sm_90a" / "h200" / "spgemm_bf16.json"
    file.parent.mkdir(parents=True)
    for text in ("{ half", '{"schema": 1, "records": [{"m": 3}]}'):
        file.write_text(text)
        with pytest.raises(RecordError, match=r"spgemm_bf16\.json"):
            db.export(tmp_path)
        assert file.read_text() == text


def test_import_keeps_the_newer_record(db: Database, tmp_path: Path) -> None:
    db.put(record(evidence=evidence(ms=2.0, when="2026-02-01T00:00:00Z")))
    db.export(tmp_path / "mine.json")
    db.put(record(evidence=evidence(ms=3.0, when="2026-03-01T00:00:00Z")))
    assert db.import_(tmp_path / "mine.json") == 0
    assert db.records()[0].evidence.ms == 3.0
    db.put(record(evidence=evidence(ms=4.0, when="2026-01-01T00:00:00Z")))
    assert db.import_(tmp_path / "mine.json") == 1
    assert db.records()[0].evidence.ms == 2.0


@pytest.mark.parametrize(
    "bad",
    [
        record(evidence=evidence(ms=math.nan)),
        record(evidence=evidence(ms=-1.0)),
        record(density=1.5),
        record(m=-1),
        record(config={"tile_q": 3}),
        record(config={"tile_m": "128"}),
    ],
    ids=["nan", "negative time", "density", "negative size", "unknown field", "wrong type"],
)
def test_an_invalid_record_is_refused(db: Database, bad: TuningRecord) -> None:
    with pytest.raises(RecordError):
        db.put(bad)
    assert db.records() == []


# --- files that are not what they should be ---


def test_an_unparsable_config_is_skipped_with_a_warning_that_names_it(db: Database) -> None:
    file = ship(db, [record()])
    file.write_text(file.read_text().replace('"tile_k"', '"tile_x"'))
    with pytest.warns(RuntimeWarning, match=r"spgemm_bf16 4096x4096x16384 on h200.*tile_x"):
        assert db.find(PROBLEM, H200) is None


def test_one_bad_shipped_record_does_not_hide_the_others(db: Database) -> None:
    file = ship(db, [record(1), record(2)])
    content = json.loads(file.read_text())
    del content["records"][0]["evidence"]
    file.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match=r"number 1 cannot be read.*evidence"):
        assert [r.m for r in db.records()] == [2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99, "records": []}', "\x00\xff"])
def test_a_damaged_shipped_file_is_skipped_with_a_warning(db: Database, text: str) -> None:
    file = ship(db, [record()])
    file.write_text(text)
    db.put(record(1))
    with pytest.warns(RuntimeWarning, match=r"spgemm_bf16\.json"):
        assert [r.m for r in db.records()] == [1]
    with pytest.raises(RecordError, match=r"spgemm_bf16\.json"):
        db.import_(file)


def damage(file: Path, how: str) -> bytes:
    """Break a database file; returns what it holds afterwards."""
    content = bytearray(file.read_bytes())
    if how == "text":
        content = bytearray(b"not a database, but a long enough text " * 40)
    elif how == "empty":
        content = bytearray()
    elif how == "truncated":
        content = content[: len(content) // 2 + 100]
    elif how == "pages":
        content[4096:] = os.urandom(len(content) - 4096)
    elif how == "foreign":
        file.unlink()
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.close()
        return file.read_bytes()
    file.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("how", ["text", "empty", "truncated", "pages", "foreign"])
@pytest.mark.parametrize("first", ["read", "write"])
def test_a_damaged_store_is_set_aside_and_work_goes_on(db: Database, how: str, first: str) -> None:
    for i in range(50):
        db.add_trial(trial(i))
    content = damage(db.user_file, how)
    db = Database.open(db.shipped_folder, db.user_file)
    with pytest.warns(RuntimeWarning, match="set aside as"):
        db.records() if first == "read" else db.put(record())
    (aside,) = db.user_file.parent.glob("*.corrupt-*Z")
    assert aside.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        db.put(record(2))
        assert 2 in [r.m for r in db.records()]


def test_damage_while_it_is_open_is_noticed(db: Database) -> None:
    db.add_trial(trial())
    damage(db.user_file, "text")
    with pytest.warns(RuntimeWarning, match="set aside as"):
        assert db.trials(PROBLEM, H200) == []
    db.add_trial(trial(5))
    assert [t.samples for t in db.trials(PROBLEM, H200)] == [5]


def test_a_second_damaged_file_does_not_replace_the_first(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "now", lambda: "2026-01-01T00:00:00Z")
    for text in (b"first" * 100, b"second" * 100):
        db.user_file.parent.mkdir(exist_ok=True)
        db.user_file.write_bytes(text)
        with pytest.warns(RuntimeWarning, match="set aside as"):
            db.records()
    found = {f.read_bytes()[:5] for f in db.user_file.parent.glob("*.corrupt-*")}
    assert found == {b"first", b"secon"}


def test_a_log_left_without_its_store_is_not_replayed_into_a_new_one(db: Database) -> None:
    db.user_file.parent.mkdir()
    Path(f"{db.user_file}-wal").write_bytes(b"some other store's log")
    db.put(record())
    assert db.records() == [record()]
    assert [f.read_bytes() for f in db.user_file.parent.glob("*.orphan*")] == [b"some other store's log"]


def test_a_newer_store_is_ignored_for_reading_refused_for_writing_and_left_alone(db: Database) -> None:
    db.put(record())
    with sqlite3.connect(db.user_file) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = db.user_file.read_bytes()
    with pytest.warns(RuntimeWarning, match="newer srelu24"):
        assert db.records() == []
    with pytest.raises(RecordError, match="schema 99"):
        db.put(record(2))
    assert db.user_file.read_bytes() == before


def test_an_older_store_is_migrated(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.put(record())
    added = "ALTER TABLE records ADD COLUMN note TEXT DEFAULT 'migrated'"
    monkeypatch.setattr(store, "_MIGRATIONS", (*store._MIGRATIONS, added))
    assert db.records() == [record()]  # reading does not need the migration
    db.put(record(2))
    assert [r.m for r in db.records()] == [2, 4096]
    with sqlite3.connect(db.user_file) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        assert connection.execute("SELECT DISTINCT note FROM records").fetchall() == [("migrated",)]
    connection.close()


def test_a_row_of_a_newer_schema_is_skipped_with_a_warning(db: Database) -> None:
    db.put(record())
    with sqlite3.connect(db.user_file) as connection:
        newer = msgspec.structs.replace(record(), schema=2)
        connection.execute("UPDATE records SET json = ?", (msgspec.json.encode(newer).decode(),))
    connection.close()
    with pytest.warns(RuntimeWarning, match="schema 2 is newer"):
        assert db.records() == []


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    db = Database.open(tmp_path / "none", tmp_path / "file" / "tuning.sqlite")
    with pytest.raises(RecordError, match="SRELU24_DATA_DIR"):
        db.put(record())


def test_a_failed_transaction_leaves_nothing_behind(db: Database) -> None:
    db.put(record())
    good, bad = db_module._insert_record(record(2)), ("INSERT INTO nowhere VALUES (1)", ())
    with pytest.raises(RecordError, match="nowhere"):
        db._store.write([good, bad])
    assert [r.m for r in db.records()] == [4096]
