"""docs/compatibility.md says what the tests say; docs/api.md has every public name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import srelu24


def test_the_page_is_current() -> None:
    written = runpy.run_path(str(Path(__file__).with_name("page.py")))
    found = written["PAGE"].read_text(encoding="utf-8")
    assert found == written["page"](), "run: python tests/compatibility/page.py"


def test_every_module_is_on_the_page() -> None:
    written = runpy.run_path(str(Path(__file__).with_name("page.py")))
    here = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert here <= {Path(module).name for module in written["MODULES"]}


def test_the_api_page_has_every_public_name() -> None:
    words = set(re.findall(r"\w+", (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")))
    assert set(srelu24.__all__) - {"__version__"} <= words
