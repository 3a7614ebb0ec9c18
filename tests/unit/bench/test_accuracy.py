"""docs/fp8.md says what its result file says, and what the file promises of the recipes holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from srelu24.bench import accuracy
from srelu24.bench.accuracy import AccuracyFile
from srelu24.documents import pages, registry
from srelu24_gen.models import Shape

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shipped() -> AccuracyFile:
    return AccuracyFile.load(ROOT / "docs" / "measurements" / "fp8_accuracy.json")


def test_the_page_says_what_the_file_says(shipped: AccuracyFile, tmp_path: Path) -> None:
    page = Path(shutil.copy(ROOT / "docs" / "fp8.md", tmp_path))
    assert not pages.fill(page, registry.of_accuracy(shipped))


def test_a_safe_recipe_loses_nothing(shipped: AccuracyFile) -> None:
    safe = [row for row in shipped.rows if row.safe]
    assert safe
    assert all(row.saturated == row.lost_rows == row.nonfinite_rows == 0 for row in safe)


def test_predicted_is_within_half_again_of_rowwise(shipped: AccuracyFile) -> None:
    by_case: dict[tuple[object, ...], dict[str, accuracy.Error]] = {}
    for row in shipped.rows:
        by_case.setdefault((row.shape, row.density, row.aligned), {})[row.candidate] = row
    for rows in by_case.values():
        predicted, rowwise = rows["predicted"], rows["rowwise"]
        for error in ("against_pruned", "worst_row", "outlier_row", "tiny_row"):
            assert getattr(predicted, error) <= 1.5 * getattr(rowwise, error)
        assert predicted.saturated == predicted.lost_rows == predicted.nonfinite_rows == 0


def test_measure_writes_a_file_that_makes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "CASES", [(Shape(24, 64, 1024), 0.5, True)])
    said: list[str] = []
    accuracy.measure(said.append).save(tmp_path / "file.json")
    file = AccuracyFile.load(tmp_path / "file.json")
    assert said == ["24x64x1024, 50% non-zero, aligned"]
    rows = {row.candidate: row for row in file.rows}
    assert rows["bf16, dense"].against_dense < 0.02 < rows["rowwise"].against_pruned < 0.2  # type: ignore[operator]
    assert rows["static"].saturated > 0  # the row 1000 times larger
    assert rows["static"].lost_rows == 1  # the row 1e-6 of the others
    text = registry.of_accuracy(file)
    assert "| rowwise |" in text["fp8_accuracy"]
    assert "| 6 sigma |" in text["fp8_bounds"]
