"""Files of records and user stores of every kind: what is read is safe to use, and the rest is a warning."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import hostile
import msgspec
import pytest
from attacks import Attack

from rows import PROBLEM, record, trial
from srelu24.cli import record_views
from srelu24.db import store as store_module
from srelu24.db.database import Database
from srelu24.db.records import TuningRecord, decode_row, read_file, write_file
from srelu24_gen.errors import RecordError
from srelu24_gen.target import TARGETS

SHIPPED = Path(__file__).parents[2] / "tuning_db"


def use(db: Database) -> list[TuningRecord]:
    """What commands and ``ffn()`` do with records."""
    records = db.records()
    record_views.records_table(records)
    for target in ("h200", "a100"):
        db.find(PROBLEM, TARGETS[target])
        db.of_widths(PROBLEM, TARGETS[target])
    db.all_trials()
    return records


def test_files_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = Attack("files of records", 0.15)
    good = {path: read_file(path) for path in sorted(SHIPPED.rglob("*.json"))}
    small = tmp_path / "small.json"
    for draw in attack:
        records = draw.choice(list(good.values()))
        write_file(small, draw.sample(records, min(4, len(records))))
        text = small.read_bytes()
        bad = hostile.damaged(text, draw) if draw.random() < 0.5 else hostile.twisted(text, draw)
        file = tmp_path / "shipped" / "sm_90a" / "h200" / "bad.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bad)
        db = Database.open(tmp_path / "shipped", tmp_path / "user" / "tuning.sqlite")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = use(db)
            try:
                taken = db.import_(file)
            except RecordError as error:
                attack.counts["refused"] += 1
                sentence = str(error)
                assert "\n" not in sentence
            else:
                attack.counts["records taken"] += taken
                assert db.export(tmp_path / "out" / "inner") == taken
        for each in found:
            assert decode_row(msgspec.json.encode(each), TuningRecord) == each
        assert {path.name for path in tmp_path.iterdir()} <= {"small.json", "shipped", "user", "out"}
        assert {path.name for path in (tmp_path / "out").glob("*")} <= {"inner"}
        for folder in ("out", "user"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)


def test_stores(tmp_path: Path) -> None:
    attack = Attack("user stores", 0.15)
    maker = Database.open(tmp_path / "none", tmp_path / "good.sqlite")
    for m in range(1, 9):
        maker.put(record(m))
        maker.add_trial(trial(m))
    good = maker.user_file.read_bytes()
    file = tmp_path / "user" / "tuning.sqlite"
    for draw in attack:
        file.parent.mkdir()
        file.write_bytes(hostile.damaged(good, draw))
        before = file.read_bytes()
        store_module._warned.clear()
        db = Database.open(SHIPPED, file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(use(db)) >= 300, "the shipped records are there whatever the user's are"
            try:
                db.put(record(77))
            except RecordError as error:
                attack.counts["could not be written"] += 1
                sentence = str(error)
                assert "\n" not in sentence
            else:
                assert 77 in {each.m for each in db.user_records()}
        aside = [path for path in file.parent.glob("*.corrupt-*Z") if path.read_bytes() == before]
        attack.counts["set aside"] += len(aside)
        attack.counts["read as they were"] += not caught
        shutil.rmtree(file.parent)
