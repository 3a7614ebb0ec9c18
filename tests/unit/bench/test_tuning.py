"""What tuning is worth, on a simulated GPU."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fake_gpu import H200, FakeGpu, better
from srelu24.bench.results import BenchFile
from srelu24.bench.tuning import bench_search, bench_tuning, summary
from srelu24.db.database import Database
from srelu24.tuning.many import Budget, tune_shapes
from srelu24_gen import cost as cost_model
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, KernelConfig, KernelSpec, Problem

SHAPES = [Shape(m, 1024, 4096) for m in (4096, 16384)]
HELD_OUT = [Shape(8192, 1024, 4096)]


def gpu(cost: object = None) -> FakeGpu:
    return FakeGpu(cost or (lambda p, c: 1.0), overhead=0.05, build_seconds=0.0)  # type: ignore[arg-type]


def unlike_the_default(problem: Problem) -> KernelConfig:
    """Likely enough to be tried, and another binary."""
    default = cost_model.best(problem, H200)
    return next(c for c in cost_model.rank(problem, H200) if c.compiled() != default.compiled())


GOOD = [unlike_the_default(p) for p in SHAPES[1].gemms(DType.BF16)]
"""Winners everywhere but, for the second GEMM, at the held-out number of tokens."""


def cost(problem: Problem, config: KernelConfig) -> float:
    if problem.m == HELD_OUT[0].m and config == GOOD[1]:
        return 1.0
    return better(*GOOD, factor=0.9)(problem, config)


@pytest.fixture
def db(tmp_path: Path) -> Database:
    found = Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")
    tune_shapes(SHAPES, DType.BF16, [gpu(cost)], Budget(30.0), db=found, key=lambda spec: f"v1-{spec.digest}")
    return found


def test_tuned_against_default_and_the_nearest_record_against_tuning(db: Database, tmp_path: Path) -> None:
    one, path = gpu(cost), tmp_path / "results" / "tuning.json"
    before = db.user_records()
    file = bench_tuning(SHAPES, HELD_OUT, DType.BF16, one, db=db, env={"gpu": "fake"}, json_path=path)
    assert [(row.op, row.shape) for row in file.rows] == [
        *(("tuning", str(s)) for s in SHAPES),
        ("fallback", str(HELD_OUT[0])),
    ]
    for row in file.rows[:2]:
        assert row.speedup["default"] == pytest.approx(1 / 0.9, rel=0.02)
        assert row.candidates["srelu24"].samples >= 16
    fallback = file.rows[2].speedup["tuned"]
    assert fallback == pytest.approx(1.0, abs=0.02), "GEMM1's winner is right there, GEMM2's is like the default"
    assert BenchFile.load(path).rows == file.rows
    assert db.user_records() == before, "what is held out stays out"
    assert one.closed
    found = summary(file.rows)
    assert found["tuning"][0] == pytest.approx(1 / 0.9, rel=0.02)
    assert found["tuning"][1] <= found["tuning"][0]
    assert found["fallback"][1:] == (fallback, str(HELD_OUT[0]))


@pytest.mark.parametrize("which", Pass)
def test_a_search_is_timed_from_nothing_and_with_built_kernels(
    which: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRELU24_CACHE_DIR", "mine")
    folders: list[str] = []

    class Builds(FakeGpu):
        """Compiles for 0.2 s what is not in the folder yet."""

        def build(self, specs: Sequence[KernelSpec]) -> Generator[tuple[KernelSpec, str | Srelu24Error], None, None]:
            folder = Path(os.environ["SRELU24_CACHE_DIR"])
            folders.append(str(folder))
            for spec, built in super().build(specs):
                kernel = folder / spec.digest
                if not kernel.exists():
                    self.clock += 0.2
                    kernel.parent.mkdir(exist_ok=True)
                    kernel.touch()
                yield spec, built

    good = {unlike_the_default(p) for p in SHAPES[1].gemms_of(which, DType.BF16)}
    path = tmp_path / "search.json"
    file = bench_search(
        SHAPES[1:],
        DType.BF16,
        lambda: Builds(lambda p, c: 0.9 if c in good else 1.0, build_seconds=0.0, overhead=0.05, sigma=0.001),
        which=which,
        json_path=path,
    )
    (row,) = BenchFile.load(path).rows
    assert [row] == file.rows
    cold, warm = row.candidates["from_nothing"], row.candidates["warm"]
    assert 60 < (cold.ms or 0) / 1000 < 90
    assert 20 < (warm.ms or 0) / 1000 < 30, "a child's start, then the budget"
    assert 1.02 < row.speedup["warm"] < 1.15, "five GEMMs in 20 s are not searched through; one found is worth 1.0204"
    assert cold.samples > 0
    assert len(set(folders)) == 1
    assert not Path(folders[0]).exists()
    assert os.environ["SRELU24_CACHE_DIR"] == "mine"


def test_a_winner_that_is_the_default_is_timed_once_and_says_so(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")
    tune_shapes(SHAPES[:1], DType.BF16, [gpu()], Budget(8.0), db=db, key=lambda spec: "")
    row = bench_tuning(SHAPES[:1], [], DType.BF16, gpu(), db=db).rows[0]
    assert row.speedup == {"default": 1.0}
    assert row.candidates["default"] == row.candidates["srelu24"]
    assert str(row.candidates["default"].note).startswith("gemm_relu2_24 128x256x64 cluster 2 stages 4 ")


def test_training_steps_are_compared_in_the_same_way(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "none", tmp_path / "tuning.sqlite")
    backward: dict[str, Any] = {"passes": (Pass.BACKWARD,), "db": db}
    faster = [unlike_the_default(p) for p in SHAPES[1].step_gemms(DType.BF16)]
    one = gpu(lambda p, c: 0.9 if c in faster else 1.0)
    tune_shapes(SHAPES, DType.BF16, [one], Budget(60.0), key=lambda spec: "", **backward)
    file = bench_tuning(SHAPES, HELD_OUT, DType.BF16, gpu(one.cost), db=db, which=Pass.BACKWARD, tune_s=60.0)
    assert [row.op for row in file.rows] == ["tuning_step", "tuning_step", "fallback_step"]
    assert all(row.speedup["default"] == pytest.approx(1 / 0.9, rel=0.03) for row in file.rows[:2])
    assert file.rows[2].speedup["tuned"] == pytest.approx(1.0, abs=0.03)
    assert set(summary(file.rows)) == {"tuning_step", "fallback_step"}


def test_a_pair_that_fails_has_its_reason_and_no_ratio(db: Database) -> None:
    one = gpu()
    one.broken = GOOD
    row = bench_tuning(SHAPES[:1], [], DType.BF16, one, db=db).rows[0]
    assert row.speedup == {}
    assert "hangs" in str(row.candidates["srelu24"].error)
    assert row.candidates["default"].ms


@pytest.mark.parametrize(
    ("shapes", "held_out", "reason"),
    [
        ([Shape(4096, 64, 256)], [], r"has no record on .*tune it first"),
        ([], SHAPES[:1], r"has one on .*hold out another"),
    ],
)
def test_shapes_must_be_recorded_and_held_out_ones_must_not(
    shapes: list[Shape], held_out: list[Shape], reason: str, db: Database
) -> None:
    one = gpu()
    with pytest.raises(Unsupported, match=reason):
        bench_tuning(shapes, held_out, DType.BF16, one, db=db)
    assert one.closed
