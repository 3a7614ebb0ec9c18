"""Which record answers a problem."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interruption import Interrupted, at_every_line
from rows import CONFIG, H200, PROBLEM, SPGEMM, evidence, record, ship
from srelu24.db import database as db_module
from srelu24.db import store
from srelu24.db.database import Database
from srelu24.db.records import TuningRecord
from srelu24_gen.spec import Activation, DType, Family, Op, Problem


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    store._warned.clear()


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database.open(tmp_path / "shipped", tmp_path / "user" / "tuning.sqlite")


# --- finding ---


def test_exact_prefers_the_user_then_the_shipped_record(db: Database) -> None:
    ship(db, [record(evidence=evidence(ms=5.0))])
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.evidence.ms, found.config) == ("exact", 5.0, CONFIG)
    db.put(record(evidence=evidence(ms=7.0)))
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.evidence.ms) == ("exact", 7.0)
    assert [r.evidence.ms for r in db.records()] == [7.0]


def test_this_gpu_comes_before_another_one(db: Database) -> None:
    db.put(record(gpu="h100"))
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.gpu) == ("other_gpu", "h100")
    db.put(record(m=1, n=64, k=64))
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.gpu) == ("nearest", "h200")
    assert db.find(PROBLEM, dataclasses.replace(H200, arch="sm_100a")) is None


def test_a_thread_that_asks_while_another_reads_gets_the_same_answer(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(db, [record(gpu="h100"), record()])  # a file each, that of the other GPU first
    reading, asked = threading.Event(), threading.Event()
    read = db_module.read_file

    def read_slowly(file: Path) -> list[TuningRecord]:
        found = read(file)
        if threading.current_thread() is not threading.main_thread() and "h200" in file.parts:
            reading.set()
            assert asked.wait(10)
        return found

    monkeypatch.setattr(db_module, "read_file", read_slowly)
    thread = threading.Thread(target=db.shipped_records)
    thread.start()
    assert reading.wait(10)
    found = db.find(PROBLEM, H200)
    asked.set()
    thread.join()
    assert found
    assert found.how == "exact"


def test_what_is_written_during_a_look_up_is_found_by_the_next(tmp_path: Path) -> None:
    another_kind = dataclasses.replace(PROBLEM, family=Family(Op.GEMM, DType.BF16))

    def check(interrupted: Interrupted, db: Database) -> None:
        def another_thread() -> None:
            db.put(record())
            db.find(another_kind, H200)

        interrupted(lambda: db.find(PROBLEM, H200), another_thread)
        assert db.find(PROBLEM, H200)

    for number, interrupted in enumerate(at_every_line(Database._of_kind)):
        check(interrupted, Database.open(tmp_path / "shipped", tmp_path / f"{number}.sqlite"))


def test_a_thread_that_read_before_does_not_take_from_another_what_it_read_since(tmp_path: Path) -> None:
    def check(interrupted: Interrupted, db: Database) -> None:
        db.find(PROBLEM, H200)
        before = db._user
        db.put(record())
        assert interrupted(lambda: db.find(PROBLEM, H200), lambda: setattr(db, "_user", before))

    for number, interrupted in enumerate(at_every_line(Database._user_records_cached)):
        check(interrupted, Database.open(tmp_path / "shipped", tmp_path / f"{number}.sqlite"))


def test_an_export_during_a_look_up_takes_no_records_away(tmp_path: Path) -> None:
    def check(interrupted: Interrupted, db: Database) -> None:
        db.put(record())
        assert interrupted(lambda: db.find(PROBLEM, H200), lambda: db.export(db.shipped_folder))

    for number, interrupted in enumerate(at_every_line(Database.shipped_records)):
        check(interrupted, Database.open(tmp_path / "shipped", tmp_path / f"{number}.sqlite"))


multiples = st.integers(1, 4096).map(lambda i: 8 * i)


@given(st.lists(st.tuples(multiples, multiples, multiples), min_size=1, max_size=12, unique=True), multiples)
def test_nearest_is_the_one_of_least_log_distance(shapes: list[tuple[int, int, int]], m: int) -> None:
    db = Database.open(Path("/nonexistent"), Path("/nonexistent/tuning.sqlite"))
    db._shipped = [record(*shape) for shape in shapes]
    wanted = Problem(SPGEMM, m, 4096, 4104)
    found = db.find(wanted, H200)

    def apart(shape: tuple[int, int, int]) -> float:
        # Written another way than the implementation: N and K count twice as much as M.
        factors = [max(a / b, b / a) for a, b in zip(shape, (wanted.m, wanted.n, wanted.k), strict=True)]
        return math.log(factors[0] * factors[1] ** 2 * factors[2] ** 2)

    assert found
    best = min(map(apart, shapes))
    assert apart((found.record.m, found.record.n, found.record.k)) == pytest.approx(best, abs=1e-9)


TOO_DEEP = dataclasses.replace(CONFIG, stages=40)
ENTRIES = st.tuples(
    st.sampled_from(["h200", "h100"]),
    st.booleans(),  # the user's or shipped
    st.booleans(),  # with a bias
    st.sampled_from([512, 2048, 4096, 8192]),
    st.sampled_from([(4096, 16384), (2048, 8192)]),
    st.sampled_from(["fits", "fits", "too deep", "unknown"]),
)


@given(st.lists(ENTRIES, max_size=14), st.booleans(), st.sampled_from([512, 700, 4096, 20000]))
@pytest.mark.filterwarnings("ignore:the tuning record for")
def test_the_order_is_exact_then_nearest_here_then_another_gpu_and_only_what_fits(
    entries: list[tuple[Any, ...]], bias: bool, m: int
) -> None:
    db = Database.open(Path("/nonexistent"), Path("/nonexistent/tuning.sqlite"))
    wanted = Problem(dataclasses.replace(SPGEMM, bias=bias), m, 4096, 16384)
    mine: dict[Any, TuningRecord] = {}
    shipped: dict[Any, TuningRecord] = {}
    for gpu, users, with_bias, size, (n, k), fits in entries:
        config = {"fits": CONFIG, "too deep": TOO_DEEP, "unknown": CONFIG}[fits].to_dict()
        family = dataclasses.replace(SPGEMM, bias=with_bias)
        new = record(size, n, k, gpu=gpu, family=family, config=config | ({"unknown": 1} if fits == "unknown" else {}))
        (mine if users else shipped)[new.key] = new
    db._shipped = [shipped[key] for key in sorted(shipped)]
    db._user = (db._store.stamp(), [mine[key] for key in sorted(mine)])

    def worth(r: TuningRecord) -> tuple[int, float, int, int]:
        """Smaller is better; written from the documentation, not from the code."""
        exact = r.gpu == "h200" and r.problem == wanted
        apart = math.log(max(r.m / m, m / r.m)) / 2 + sum(
            abs(math.log(a / b)) for a, b in ((r.n, wanted.n), (r.k, wanted.k))
        )
        return (
            0 if exact else 1 if r.gpu == "h200" else 2,
            round(apart, 9),
            r.family.bias != bias,
            r not in mine.values(),
        )

    usable = [r for r in (*mine.values(), *shipped.values()) if r.config == CONFIG.to_dict()]
    found = db.find(wanted, H200)
    if not usable:
        assert found is None
        return
    assert found
    assert worth(found.record) == min(map(worth, usable))
    assert found.how == ("exact", "nearest", "other_gpu")[worth(found.record)[0]]
    assert found.config == CONFIG


def test_records_of_the_widths_are_sorted_by_tokens_and_the_nearest_family_counts(db: Database) -> None:
    with_bias = dataclasses.replace(SPGEMM, bias=True)
    ship(db, [record(m, evidence=evidence(ms=1.0)) for m in (8192, 512)])
    db.put(record(512, family=with_bias, evidence=evidence(ms=2.0)))
    db.put(record(8192, evidence=evidence(ms=3.0)))
    db.put(record(2048, family=with_bias))
    db.put(record(1024, n=64))
    db.put(record(1024, gpu="h100"))
    found = db.of_widths(PROBLEM, H200)
    assert [(r.m, r.family.bias) for r in found] == [(512, False), (2048, True), (8192, False)]
    assert found[2].evidence.ms == 3.0, "the user's own first"
    assert db.of_widths(dataclasses.replace(PROBLEM, n=128), H200) == []


def test_families_that_differ_by_options_are_hints_and_their_own_kind_comes_first(db: Database) -> None:
    with_bias = dataclasses.replace(SPGEMM, bias=True)
    db.put(record(family=with_bias, evidence=evidence(ms=2.0)))
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.family) == ("nearest", with_bias)
    db.put(record(evidence=evidence(ms=3.0)))
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.family) == ("exact", SPGEMM)
    for other in (Family(Op.GEMM, DType.BF16), Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2)):
        assert db.find(dataclasses.replace(PROBLEM, family=other), H200) is None


def test_a_config_that_does_not_fit_the_problem_is_passed_over(db: Database) -> None:
    too_deep = dataclasses.replace(CONFIG, stages=40)
    db.put(record(config=too_deep.to_dict()))
    assert db.find(PROBLEM, H200) is None
    db.put(record(m=1))
    found = db.find(PROBLEM, H200)
    assert found
    assert (found.how, found.record.m) == ("nearest", 1)


def test_bf16_and_fp16_share_records_and_their_own_comes_first(db: Database) -> None:
    half = dataclasses.replace(PROBLEM, family=dataclasses.replace(SPGEMM, dtype=DType.FP16))
    db.put(record(evidence=evidence(ms=2.0)))
    found = db.find(half, H200)
    assert found
    assert (found.how, found.record.family) == ("nearest", SPGEMM)
    assert [r.family.dtype for r in db.of_widths(half, H200)] == [DType.BF16]
    db.put(record(family=half.family, evidence=evidence(ms=3.0)))
    found = db.find(half, H200)
    assert found
    assert (found.how, found.record.family.dtype) == ("exact", DType.FP16)
    assert [r.family.dtype for r in db.of_widths(half, H200)] == [DType.FP16]
    assert [r.family.dtype for r in db.of_widths(PROBLEM, H200)] == [DType.BF16]
