"""Prose of the documents stands in lines that anyone can read beside other windows; the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "examples", "tuning_db") for page in (ROOT / folder).rglob("*.md")),
    ]
)
_GENERATED = re.compile(r"<!-- results:.*?<!-- /results -->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_have_at_most_120_columns(page: Path) -> None:
    text = _GENERATED.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))
    lines = enumerate(text.splitlines(), start=1)
    long = [number for number, line in lines if len(line) > 120 and not line.startswith("|")]
    assert not long, f"{page.name} has longer lines: {long}"


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
