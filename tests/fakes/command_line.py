"""The command line, run inside of a test."""

from __future__ import annotations

from types import SimpleNamespace

from typer.testing import CliRunner

from srelu24.cli import main
from srelu24_gen.models import Shape

SMALL = Shape(256, 512, 1024)


def srelu24(*arguments: str, code: int = 0) -> SimpleNamespace:
    """Runs the command line in this process; `.stdout` and `.stderr` of it."""
    result = CliRunner().invoke(main.app, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return SimpleNamespace(stdout=result.stdout, stderr=result.stderr)
