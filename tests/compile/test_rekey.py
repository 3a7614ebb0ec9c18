"""Records of kernels whose sources change: a comment leaves them alone, the same machine code keeps them, other code
does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from command_line import srelu24
from rows import evidence, record
from srelu24.db import health
from srelu24.db.database import Database
from srelu24.db.records import TuningRecord, read_file, write_file
from srelu24_gen import compile as compile_module
from srelu24_gen import paths
from srelu24_gen.compile import key_of
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A checkout of today, to be edited into an earlier one."""
    root = tmp_path / "before"
    assert paths.checkout(), "tests run from a checkout"
    for name in ("generator", "templates"):
        shutil.copytree(paths.checkout() / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def record_of(op: Op, tree: Path, monkeypatch: pytest.MonkeyPatch) -> TuningRecord:
    """One that names the kernel of that tree."""
    family = Family(op, DType.BF16)
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "templates_dir", lambda: tree / "templates")
        key = key_of(KernelSpec(family, KernelConfig()))
    return record(family=family, config=KernelConfig().to_dict(), evidence=evidence(source_digest=key))


def edit(header: Path, old: str, new: str) -> None:
    text = header.read_text()
    assert old in text, f"{header} no longer has {old!r}"
    header.write_text(text.replace(old, new))


def test_an_edited_comment_makes_no_shipped_record_stale(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (before / "templates").rglob("*.cuh"):
        source.write_text(f"// An edited comment.\n\n{source.read_text()}")
    monkeypatch.setattr(compile_module, "templates_dir", lambda: before / "templates")
    records = Database.open().shipped_records()
    assert len(records) > 300
    assert health.stale(records) == []


def test_the_same_machine_code_keeps_a_record_and_nothing_else_does(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = before / "templates" / "include" / "srelu24"
    edit(headers / "transpose.cuh", "column0", "first_column")
    edit(headers / "dense_columns.cuh", "8 * block", "9 * block")
    edit(headers / "sparsify24.cuh", "#pragma once", "// A comment.\n#pragma once")
    tidied, other, same = (record_of(op, before, monkeypatch) for op in (Op.TRANSPOSE, Op.DENSE_COLUMNS, Op.SPARSIFY24))
    unknown = record(m=64, family=tidied.family, config=tidied.config)
    folder = tmp_path / "records"
    file = folder / "all.json"
    folder.mkdir()
    write_file(file, [tidied, other, same, unknown])
    was = file.read_bytes()

    said = srelu24("db", "rekey", str(before), "--records", str(folder), "--dry-run", code=1)
    assert file.read_bytes() == was
    said = srelu24("db", "rekey", str(before), "--records", str(folder), code=1)
    assert "1 records renewed, 1 named today's kernels, 2 stay stale" in said.stderr
    now = {each.key: each for each in read_file(file)}
    today = key_of(KernelSpec(tidied.family, KernelConfig()))
    assert now[tidied.key].evidence.source_digest == today != tidied.evidence.source_digest
    assert [now[each.key] for each in (other, same, unknown)] == [other, same, unknown]
    assert len([line for line in file.read_bytes().splitlines() if line not in was.splitlines()]) == 1


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    said = srelu24("db", "rekey", str(tmp_path), code=1)
    assert "no checkout of srelu24" in said.stderr
