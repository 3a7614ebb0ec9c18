"""Random command lines: no traceback, exit code 0, 1 or 2, and where it is not 0 one sentence says why."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import typer
from attacks import Attack
from typer.testing import CliRunner

from rows import record
from srelu24.cli import main
from srelu24.db.database import Database

SECONDS = 15
"""After so long a command is ended as by Ctrl-C: it was given a search or a sum that takes long, which is no fault."""
HEAVY = {"run", "bench training", "bench accuracy", "bench model"}
"""They compute for minutes, whatever they are given."""
LEFT_OUT = {"--all-models", "--help"}
WORDS = (
    "",
    "0",
    "1",
    "-1",
    "--5",
    "64",
    "2048",
    "1e999",
    "nan",
    "9" * 30,
    "9" * 5000,
    "²",
    "64x64x64",
    "64x320x832",
    "0x0x0",
    "8x64",
    f"{'9' * 40}x64x64",
    "bf16",
    "e4m3",
    "fp64",
    "h200",
    "H100",
    "nosuch",
    "gemm",
    "spgemm",
    "nanochat",
    "1,2,3",
    "all",
    "backward",
    "tile_m=--5",
    "tile_m=64,tile_m",
    f"stages={'9' * 5000}",
    "stages=4",
    "[red]x[/red]",
    "ü\u202e",
    "a\nb",
    "\udcff",
    "$(id)",
    "os:getcwd",
    "no.such:thing",
)


def files() -> tuple[str, ...]:
    """Names in the current folder, made for the purpose, and devices."""
    Path("good.json").write_bytes(b'{"schema": 1, "records": []}')
    Path("bad.json").write_bytes(b"\xff[" * 1000)
    Path("deep.json").write_bytes(b"[" * 10**6)
    Path("page.md").write_text("# A page\n")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    with contextlib.suppress(FileExistsError):
        os.mkfifo("pipe")
    made = ("good.json", "bad.json", "deep.json", "page.md", "folder", "loop", "pipe", "none", "none/none")
    return (*made, "n" * 300, "d/" * 3000, "/dev/null", "/dev/full", "/dev/zero", "~nosuch/x")


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for each, command in group.commands.items():
        path = f"{name} {each}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, path)
        elif path not in HEAVY:
            yield path, command


PLAUSIBLE = {
    "--shape": ("64x320x832", "256x512x1024"),
    "--dtype": ("bf16", "fp16", "e4m3"),
    "--gpu": ("h200", "a100"),
    "--model": ("nanochat",),
    "--tokens": ("64", "16,64"),
    "--pass": ("forward", "backward", "all"),
    "--density": ("0.1", "1"),
    "--d-model": ("320",),
    "--d-ff": ("832",),
    "--config": ("stages=3", "tile_m=64,stages=2"),
    **dict.fromkeys(("--seconds", "--jobs", "--steps", "--seed", "--seeds", "--budget", "--total"), ("1", "2")),
    "op": ("gemm", "spgemm", "sparsify24"),
    "kernel": ("spgemm",),
}
"""Values that commands take, so that some get further than to their arguments."""


def arguments(command: Any, paths: tuple[str, ...], draw: random.Random) -> list[str]:
    found: list[str] = []
    wanted = draw.choice((0.1, 0.3, 0.5))
    sane = draw.choice((0.5, 0.9, 1.0))
    for parameter in command.params:
        if parameter.opts[0].startswith("-"):
            option = draw.choice([*parameter.opts, *parameter.secondary_opts])
            if LEFT_OUT & {*parameter.opts} or not (parameter.required or draw.random() < wanted):
                continue
            found.append(option)
            if parameter.is_flag:
                continue
        elif draw.random() < 0.1:
            continue
        if draw.random() < sane:
            found.append(draw.choice(PLAUSIBLE.get(parameter.opts[0], paths)))
        else:
            found.append(draw.choice(WORDS if draw.random() < 0.6 else paths))
    if draw.random() < 0.1:
        found.insert(draw.randrange(len(found) + 1), draw.choice(("--nosuch", "-x", "--", "\x00", "extra")))
    return found


def end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def test_command_lines(compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Database.open().put(record())
    attack, paths = Attack("command lines", 0.2, least=500), files()
    whole = typer.main.get_command(main.app)
    known = sorted(commands(whole))
    monkeypatch.setattr("typer.testing._get_command", lambda _: whole)  # made once: making it takes most of the time
    before = signal.signal(signal.SIGALRM, end)
    try:
        for draw in attack:
            name, command = draw.choice(known)
            words = [*name.split(), *arguments(command, paths, draw)]
            signal.alarm(SECONDS)
            result = CliRunner().invoke(main.app, words, input="n\n")
            signal.alarm(0)
            said = f"{words}\n{result.output}\n{result.exception!r}"
            attack.counts[f"ended with {result.exit_code}"] += 1
            assert result.exit_code in (0, 1, 2, 130), said
            assert isinstance(result.exception, SystemExit | None), said
            assert "srelu24 itself failed" not in result.output, said
            assert "Traceback" not in result.output, said
            if result.exit_code in (1, 2):
                assert result.stderr.strip(), said
            errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) <= 1, said
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
