"""What attacks start from, and their counts at the end."""

from __future__ import annotations

from pathlib import Path

import attacks
import pytest

import made_up_compiler


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that makes cubins up, and a machine with nothing on it."""
    made_up_compiler.install(monkeypatch)
    made_up_compiler.machine(tmp_path, monkeypatch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, counts in attacks.COUNTS.items():
        what = ", ".join(f"{count} {word}" for word, count in counts.items())
        terminalreporter.write_line(f"attack on {name}: {what}")
