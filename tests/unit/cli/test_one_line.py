"""Whatever ends a command is one line: bad arguments, streams that are closed or full, odd locales, our mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import made_up_compiler
from command_line import srelu24
from srelu24_gen.store import BuildStore

ROOT = Path(__file__).parents[3]


def shell(command: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``srelu24`` in a shell; its output as text of any encoding."""
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))},
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "generator", ROOT / "python"))),
        "SRELU24_DATA_DIR": str(tmp_path / "data"),
        "SRELU24_CACHE_DIR": str(tmp_path / "cache"),
        **environment,
    }
    program = f'srelu24() {{ "{sys.executable}" -m srelu24 "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", program + command], env=env, capture_output=True, text=True, errors="replace", timeout=120
    )


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("srelu24 list --models > /dev/full", 1, "No space left on device"),
        ("srelu24 --help > /dev/full", 1, "No space left on device"),
        ("srelu24 --version > /dev/full", 1, "No space left on device"),
        ("srelu24 list --models >&-", 0, ""),
        ("srelu24 list --models >&- 2>&-", 0, ""),
        ("srelu24 load none.zip 2>&-", 1, ""),
        ("srelu24 load none.zip 2> /dev/full", 1, ""),
        ("set -o pipefail; srelu24 list --matrix | true", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, words: str, tmp_path: Path) -> None:
    done = shell(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_locales_that_know_no_unicode(locale: dict[str, str], tmp_path: Path) -> None:
    for command in ("srelu24 list --models", "srelu24 render gemm", "srelu24 --help"):
        done = shell(command, tmp_path, **locale)
        assert (done.returncode, done.stderr) == (0, "")
    done = shell(r"srelu24 load $'\xff\xe2.zip'", tmp_path, **locale)
    assert done.returncode == 1
    assert "cannot be read" in done.stderr


def test_a_mistake_of_ours_is_one_line_and_a_traceback_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise IndexError("a\nb" * 500)

    monkeypatch.setattr(BuildStore, "entries", fail)
    said = srelu24("cache", "list", code=1)
    assert said.stderr.startswith("error: srelu24 itself failed with IndexError: a b")
    assert said.stderr.count("\n") == 1
    with pytest.raises(AssertionError, match="IndexError"):
        srelu24("--debug", "cache", "list")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("render", "spgemm", "--config", "tile_m=--5"), 1),
        (("render", "spgemm", "--config", f"tile_m={'9' * 5000}"), 1),
        (("render", "spgemm", "--config", "tile_m=²"), 1),
        (("render", "spgemm", "--config", "tile_m=-64"), 1),
        (("list", "--shape", f"{'9' * 5000}x64x64"), 2),
        (("list", "--model", "nanochat", "--tokens", "9" * 5000), 2),
        (("bench", "gemm", "--seconds", "1e999"), 1),
        (("render", "spgemm", "-o", "n" * 300), 1),
        (("render", "spgemm", "-o", "/dev/full"), 1),
        (("render", "spgemm", "-o", "/"), 1),
        (("load", "n" * 300), 1),
        (("db", "import", "n" * 300), 1),
        (("db", "rekey", "n" * 300), 1),
        (("tune", "--shape", "64x64x64", "--budget", "9" * 400), 2),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_arguments_that_are_nonsense(
    arguments: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuning_db").mkdir()
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))
    said = srelu24(*arguments, code=code)
    assert "srelu24 itself failed" not in said.stderr
    assert said.stderr.strip()


# --- the cache


def test_the_cache_is_listed_swept_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_compiler.install(monkeypatch)
    made_up_compiler.machine(tmp_path, monkeypatch)
    assert "0 kernels" in srelu24("cache", "list").stderr
    srelu24("build", "--gpu", "h200", "--shape", "64x320x832")
    said = srelu24("cache", "list")
    assert "2 kernels" in said.stderr
    assert "gemm_relu2_24_bf16_sm_90a" in said.stdout.replace("\n", "")
    kernels = json.loads(srelu24("cache", "list", "--json").stdout)
    assert len(kernels) == 2
    folder = next((tmp_path / "cache").glob("spgemm*"))
    (folder / "kernel.cubin").write_bytes(b"")
    assert "1 folders removed" in srelu24("cache", "sweep").stderr
    assert "1 kernels" in srelu24("cache", "list").stderr
    assert "1 kernels removed" in srelu24("cache", "clear", "--yes").stderr
    assert "0 kernels" in srelu24("cache", "list").stderr
