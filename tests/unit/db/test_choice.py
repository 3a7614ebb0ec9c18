"""What is answered between records, by what was measured at numbers of tokens whose records are taken away."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median

import pytest

from srelu24.db import choice, fit
from srelu24.db.database import Database
from srelu24.db.fit import Timed
from srelu24.db.records import TuningRecord
from srelu24_gen import paths
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelConfig
from srelu24_gen.target import TARGETS

H200 = TARGETS["h200"]
_, TRIALS = fit.read(Path(__file__).parents[3] / "docs/measurements/trials_h200.json")
SPARSE = [problem.family for problem in Shape(64, 64, 64).gemms(DType.BF16)]
RECORDED = (256, 512, 1024, 2048, 8192, 16384)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[TuningRecord]:
    return Database.open(paths.shipped_records_dir(), tmp_path_factory.mktemp("user") / "none.sqlite").records()


def speed_of(config: KernelConfig, tried: list[Timed]) -> float | None:
    """Beside the others of its problem; of another raster group where this one was not tried, None where none was."""
    if same := [timed.speed for timed in tried if timed.config == config]:
        return same[0]
    alike = [t.speed for t in tried if (t.config.compiled(), t.config.stream_k) == (config.compiled(), config.stream_k)]
    return median(alike) if alike else None


def test_with_the_records_of_these_tokens_left_out_the_answer_is_nearly_the_fastest(
    records: list[TuningRecord], tmp_path: Path
) -> None:
    behind, unknown = [], 0
    for tokens in RECORDED:
        others = Database.open(tmp_path / "none", tmp_path / f"without {tokens}.sqlite")
        others.take(record for record in records if record.family in SPARSE and record.m != tokens)
        for problem, tried in TRIALS.items():
            if problem.m == tokens and problem.family in SPARSE:
                answer = choice.answer(problem, H200, others)
                assert answer.source != "exact"
                speed = speed_of(answer.config, tried)
                if speed is None:
                    unknown += 1
                else:
                    behind.append(math.log(max(timed.speed for timed in tried) / speed))
    assert len(behind) > 150
    assert unknown < 10
    assert mean(behind) < 0.006
    assert sum(each > 0.03 for each in behind) < 9
