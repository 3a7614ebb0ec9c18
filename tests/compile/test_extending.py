"""docs/extending.md, followed to the letter in a copy of the tree: its edits are made, its commands run, tests pass.

A block of ``diff`` names a file and has lines of it, with new ones marked +. A block of ``console`` has commands.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from srelu24_gen import paths

pytestmark = pytest.mark.slow
PAGE = "docs/extending.md"


@dataclass(frozen=True)
class Block:
    kind: str
    text: str


def blocks_of(section: str) -> list[Block]:
    """The blocks below a heading of the page, in their order."""
    root = paths.checkout()
    assert root
    page = (root / PAGE).read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return [Block(*found) for found in re.findall(r"^```(diff|console)\n(.*?)^```", body, re.MULTILINE | re.DOTALL)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what git tracks here."""
    root = paths.checkout()
    assert root
    copy = tmp_path / "tree"
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    return copy


def apply(diff: str, tree: Path) -> str:
    """Make the edit; the file's name. Every hunk's lines must be there, once, and one after the other."""
    first, *lines = diff.splitlines()
    name = first.removeprefix("--- ")
    content = (tree / name).read_text(encoding="utf-8").splitlines()
    for hunk in "\n".join(lines).split("\n@@\n"):
        marked = [(line[:1] or " ", line[1:]) for line in hunk.split("\n")]
        old = [text for mark, text in marked if mark == " "]
        new = [text for _, text in marked]
        places = [i for i in range(len(content)) if content[i : i + len(old)] == old]
        assert places, f"{name} no longer has these lines:\n" + "\n".join(old)
        content[places[0] : places[0] + len(old)] = new
    (tree / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    return name


def run(command: list[str], tree: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree / "generator"), str(tree / "python"), *filter(None, sys.path)]),
        "SRELU24_CACHE_DIR": str(tree.parent / "cache"),
        "SRELU24_DATA_DIR": str(tree.parent / "data"),
    }
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def follow(section: str, tree: Path) -> set[str]:
    """Do what a section says; the files that it changed."""
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    for block in blocks_of(section):
        if block.kind == "diff":
            apply(block.text, tree)
            continue
        for line in block.text.splitlines():
            program, *arguments = shlex.split(line.removeprefix("$ "))
            start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
            run([*start, *arguments], tree)
    now = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {str(path.relative_to(tree)) for path in now if now[path] != before.get(path)}


def run_tests(tree: Path, *names: str) -> None:
    run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names], tree)


def test_a_tile_is_a_line(tree: Path) -> None:
    changed = follow("A tile", tree)
    assert changed == {"generator/srelu24_gen/space_sm90.py", "CHANGELOG.md"}
    run_tests(tree, "tests/unit/generator", "tests/unit/runtime/test_launch.py", "tests/unit/db/test_fit.py")


def test_an_epilogue_is_a_functor_a_row_and_a_reference(tree: Path) -> None:
    changed = follow("An epilogue", tree)
    assert changed == {
        "templates/include/srelu24/activation.cuh",
        "generator/srelu24_gen/spec.py",
        "python/srelu24/numerics/activations.py",
        "docs/numerics.md",
        "CHANGELOG.md",
    }
    run_tests(tree, "tests/unit/generator", "tests/unit/numerics", "tests/unit/ops", "tests/unit/measuring")
    run_tests(tree, "tests/unit/db", "tests/unit/shipping/test_bundle.py")


def test_a_gpu_is_an_entry(tree: Path) -> None:
    changed = follow("A GPU model", tree)
    assert changed == {"generator/srelu24_gen/target.py", "docs/support.md"}
    run_tests(tree, "tests/unit/generator", "tests/unit/documents/test_support.py")


def test_an_edit_that_no_longer_fits_is_found(tree: Path) -> None:
    with pytest.raises(AssertionError, match="no longer has these lines"):
        apply("--- CHANGELOG.md\n ### Dropped\n+- Nothing.", tree)
