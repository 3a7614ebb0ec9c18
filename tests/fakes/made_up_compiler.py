"""A compiler that makes cubins up, and machines with and without it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import made_up_cubin
from srelu24.db.database import Database
from srelu24.runtime import dispatch
from srelu24_gen import compile as compiler
from srelu24_gen import paths
from srelu24_gen.errors import ToolchainError
from srelu24_gen.target import Toolchain

_REPORT = """ptxas info    : Compiling entry function '{entry}' for '{arch}'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 64 bytes smem
"""


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put it in the compiler's place; the names of what it is asked for."""
    asked: list[str] = []

    def compile_source(source: str, name: str, *, arch: str, entry: str, **_: Any) -> compiler.Compiled:
        asked.append(name)
        code = hashlib.sha256(source.encode()).digest() * 50
        return compiler.Compiled(made_up_cubin.cubin(entry, code, arch), _REPORT.format(entry=entry, arch=arch), 0.1)

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    return asked


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, shipped: Path | None = None) -> Database:
    """Moves to another machine: nothing built, nothing recorded but what ships."""
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(folder / "data"))
    monkeypatch.setattr(paths, "shipped_records_dir", lambda: shipped or folder / "shipped")
    dispatch.clear_cache()
    return Database.open()


def no_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing can compile."""

    def find() -> Toolchain:
        raise ToolchainError("there is no NVRTC")

    monkeypatch.setattr(Toolchain, "find", find)
    dispatch.clear_cache()
