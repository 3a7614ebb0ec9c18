"""Which shapes a command gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import SMALL, srelu24
from srelu24.cli import live
from srelu24.cli import run as main_job
from srelu24.shipping import catalogue
from srelu24_gen.models import MODELS, TOKENS, Shape
from srelu24_gen.target import target_by_key

H200 = target_by_key("h200")


@pytest.fixture(autouse=True)
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))


# --- which shapes a command gets ------------------------------------------------------------------------------------

DEFAULT = Shape(16384, 4096, 16384)
MINITRON = ["--model", "minitron-4b"]
GIVEN = [
    pytest.param(["--shape", str(SMALL)], [SMALL], id="a shape"),
    pytest.param([*MINITRON, "--tokens", "8"], [Shape(8, 3072, 9216)], id="a model"),
    pytest.param(MINITRON, [Shape(m, 3072, 9216) for m in TOKENS], id="a model at the standard token counts"),
    pytest.param(
        [*MINITRON, "--model", "Nanochat", "--tokens", "8,16", "--shape", str(SMALL), "--shape", "8x16x24"],
        [
            SMALL,
            Shape(8, 16, 24),
            Shape(8, 3072, 9216),
            Shape(16, 3072, 9216),
            Shape(8, 768, 3072),
            Shape(16, 768, 3072),
        ],
        id="several of both",
    ),
    pytest.param(
        ["--model", "paper-7b", "--model", "nemotron-3-8b", "--shape", "8x4096x16384", "--tokens", "8,8"],
        [Shape(8, 4096, 16384)],
        id="the same one under several names",
    ),
]
COMMANDS = [["list"], ["build"], ["tune"], ["run"], ["bench", "ffn"], ["bench", "gemm"]]


@pytest.fixture
def requested_shapes(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """What the commands pass on, instead of doing it."""
    from srelu24.cli import tune
    from srelu24.tuning import many

    shapes: list[Shape] = []

    def one(shape: Shape, *_: object) -> list[Any]:
        shapes.append(shape)
        return []

    def several(given: list[Shape], *_: object, **__: object) -> list[Any]:
        shapes.extend(given)
        return []

    monkeypatch.setattr(catalogue, "kernels", one)
    monkeypatch.setattr(catalogue, "specs_for", several)
    monkeypatch.setattr(catalogue, "build_kernels", lambda *_, **__: [])
    monkeypatch.setattr(tune, "_runners", lambda gpus: [])
    monkeypatch.setattr(many, "tune_shapes", several)
    monkeypatch.setattr(main_job, "run", lambda given, *_: shapes.extend(given) or True)
    monkeypatch.setattr(live, "benchmark", lambda what, given, *_, **__: shapes.extend(given))
    return shapes


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(("arguments", "shapes"), GIVEN)
def test_commands_take_shapes_and_models(
    command: list[str], arguments: list[str], shapes: list[Shape], requested_shapes: list[Shape]
) -> None:
    srelu24(*command, *arguments)
    assert requested_shapes == shapes


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_shape_the_default_is_taken_but_not_tuned(command: list[str], requested_shapes: list[Shape]) -> None:
    tuned = command == ["tune"]  # a search takes minutes: which shape is for the user to say
    result = srelu24(*command, code=2 if tuned else 0)
    assert requested_shapes == ([] if tuned else [DEFAULT])
    assert ("give --shape MxDxF or --model" in result.stderr) == tuned


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "nemotron-4-16b"], "nemotron-4-15b"),
        (["--tokens", "4096"], "--model"),
        (["--tokens", "4096", "--shape", str(SMALL)], "--model"),
        (["--shape", str(SMALL), "--dtype", "fp32"], "gradients alone"),
        (["--shape", str(SMALL), "--dtype", "e5m2"], "e5m2"),
        *[([*MINITRON, "--tokens", tokens], "4096,16384") for tokens in ("", "4k", "8,", "8 16", "-8", "0", "8.0")],
    ],
)
def test_wrong_models_types_and_token_counts_are_refused(
    command: list[str], arguments: list[str], reason: str, requested_shapes: list[Shape]
) -> None:
    result = srelu24(*command, *arguments, code=2)
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert requested_shapes == []


def test_list_models_prints_the_table() -> None:
    table = srelu24("list", "--models").stdout
    for key, model in MODELS.items():
        row = next(line for line in table.splitlines() if line.startswith(f"{key} "))
        assert row.split(maxsplit=3) == [key, str(model.d_model), str(model.d_ff), model.name]
    rows = json.loads(srelu24("list", "--models", "--json").stdout)
    assert rows[0] == {
        "key": "paper-1b",
        "name": "arXiv 2503.16672, 1B",
        "d_model": 2048,
        "d_ff": 8192,
        "note": "the paper's accuracy table",
    }
    assert [row["key"] for row in rows] == list(MODELS)
