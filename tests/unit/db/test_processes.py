"""The user's store under many processes, and kill -9."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from rows import H200, PROBLEM, record, trial
from srelu24.db import store
from srelu24.db.database import Database


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    store._warned.clear()


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "shipped", tmp_path / "user" / "tuning.sqlite")


# --- many processes ---

FORK = multiprocessing.get_context("fork")  # the modules are loaded already


def _write_trials(file: Path, writer: int, count: int, acknowledged: Any) -> None:
    db = Database.open(file.parent / "none", file)
    for i in range(count):
        db.add_trial(trial(writer * 100_000 + i))
        os.write(acknowledged, b"%d\n" % (writer * 100_000 + i))


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tuning.sqlite"
    reader, writer = os.pipe()
    processes = [FORK.Process(target=_write_trials, args=(file, i, 15, writer)) for i in range(6)]
    for process in processes:  # all of them find no store and create one
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 6
    os.close(writer)
    os.close(reader)
    stored = [t.samples for t in Database.open(tmp_path / "none", file).trials(PROBLEM, H200)]
    assert sorted(stored) == [w * 100_000 + i for w in range(6) for i in range(15)]
    for w in range(6):
        own = [s for s in stored if s // 100_000 == w]
        assert own == sorted(own)


def _write_many(file: Path, writer: int) -> None:
    db = Database.open(file.parent / "none", file)
    for start in range(0, 1000, 50):
        db.add_trial(*(trial(writer * 1000 + start + i) for i in range(50)))
        db.put(record(writer * 1000 + start + 1))


def test_eight_processes_write_a_thousand_each_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "tuning.sqlite"
    processes = [FORK.Process(target=_write_many, args=(file, i)) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 8
    db = Database.open(tmp_path / "none", file)
    assert sorted(t.samples for t in db.trials(PROBLEM, H200)) == list(range(8000))
    assert {r.m for r in db.user_records()} == {1000 * w + 50 * i + 1 for w in range(8) for i in range(20)}


def test_what_was_written_survives_kill_9(tmp_path: Path) -> None:
    file = tmp_path / "tuning.sqlite"
    acknowledged: list[int] = []
    for round_ in range(4):
        reader, writer = os.pipe()
        processes = [FORK.Process(target=_write_trials, args=(file, 2 * round_ + i, 10_000, writer)) for i in range(2)]
        for process in processes:
            process.start()
        os.close(writer)
        time.sleep(0.15 + 0.07 * round_)
        for process in processes:
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        with os.fdopen(reader) as pipe:
            acknowledged += [int(line) for line in pipe.read().split("\n")[:-1]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # in particular: not set aside
            stored = {t.samples for t in Database.open(tmp_path / "none", file).trials(PROBLEM, H200)}
        assert stored >= set(acknowledged)
    assert len(acknowledged) > 8


def test_many_processes_set_a_damaged_store_aside_once(tmp_path: Path) -> None:
    file = tmp_path / "tuning.sqlite"
    file.write_bytes(b"damaged" * 200)
    devnull = os.open(os.devnull, os.O_WRONLY)
    processes = [FORK.Process(target=_write_trials, args=(file, i, 3, devnull)) for i in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    os.close(devnull)
    assert [p.exitcode for p in processes] == [0] * 5
    assert len(list(tmp_path.glob("*.corrupt-*Z*"))) == 1
    assert len(Database.open(tmp_path / "none", file).trials(PROBLEM, H200)) == 15
