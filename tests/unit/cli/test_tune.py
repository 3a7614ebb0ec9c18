"""``srelu24 tune``: which shapes, how long, on which GPUs, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import SMALL, srelu24
from fake_gpu import FakeGpu
from srelu24.cli import tune as cli_tune
from srelu24.db import records
from srelu24.tuning import many
from srelu24.tuning.many import Budget, Tuned
from srelu24_gen.models import MODELS, Pass, Shape
from srelu24_gen.spec import DType


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the command passes on, instead of tuning."""
    found: list[SimpleNamespace] = []

    def tune_shapes(
        shapes: Sequence[Shape], dtype: DType, runners: object, budget: Budget, **options: Any
    ) -> list[Tuned]:
        found.append(SimpleNamespace(shapes=list(shapes), dtype=dtype, budget=budget, **options))
        return [Tuned(shape, which, "h200") for shape in shapes for which in options["passes"]]

    monkeypatch.setattr(many, "tune_shapes", tune_shapes)
    monkeypatch.setattr(cli_tune, "_runners", lambda gpus: [])
    return found


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated H200, whose kernels have the keys that the simulation gives them."""
    monkeypatch.setattr(cli_tune, "_runners", lambda gpus: [FakeGpu(overhead=0.05, build_seconds=0.0)])


def test_options_reach_the_tuner(calls: list[SimpleNamespace]) -> None:
    arguments = ["--shape", str(SMALL), "--dtype", "fp16", "--density", "0.5", "--budget", "30", "--no-resume"]
    out = srelu24("tune", *arguments, "--dense", "--json")
    (call,) = calls
    assert (call.shapes, call.dtype, call.density, call.resume, call.dense) == ([SMALL], DType.FP16, 0.5, False, True)
    assert call.budget == Budget(30.0)
    assert json.loads(out.stdout)[0]["shape"] == list(SMALL)
    assert "0 tuned, 1 tuned before, 0 failed" in out.stderr


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        ([], Budget(120.0)),
        (["--budget", "2m"], Budget(120.0)),
        (["--budget", "1.5s"], Budget(1.5)),
        (["--total", "480s"], Budget(480.0, per_shape=False)),
        (["--total", "1h"], Budget(3600.0, per_shape=False)),
    ],
)
def test_time_is_per_shape_or_in_total(arguments: list[str], budget: Budget, calls: list[SimpleNamespace]) -> None:
    srelu24("tune", "--shape", str(SMALL), *arguments)
    assert calls[0].budget == budget


def test_widths_and_all_models(calls: list[SimpleNamespace]) -> None:
    srelu24("tune", "--d-model", "1024", "--d-ff", "4096", "--tokens", "8,16")
    assert calls[-1].shapes == [Shape(8, 1024, 4096), Shape(16, 1024, 4096)]
    srelu24("tune", "--all-models", "--tokens", "512")
    widths = {(s.d, s.f) for s in calls[-1].shapes}
    assert widths == {(m.d_model, m.d_ff) for m in MODELS.values()} - {(18432, 73728)}
    assert len(calls[-1].shapes) == len(widths)


@pytest.mark.parametrize(
    ("arguments", "passes"),
    [
        ([], (Pass.FORWARD,)),
        (["--pass", "forward"], (Pass.FORWARD,)),
        (["--pass", "backward"], (Pass.BACKWARD,)),
        (["--pass", "all"], (Pass.FORWARD, Pass.BACKWARD)),
    ],
)
def test_passes_reach_the_tuner(arguments: list[str], passes: tuple[Pass, ...], calls: list[SimpleNamespace]) -> None:
    out = srelu24("tune", "--shape", str(SMALL), *arguments, "--json")
    assert calls[0].passes == passes
    assert [row["which"] for row in json.loads(out.stdout)] == list(passes)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--pass", "sideways"], 2, "backward"),
        (["--budget", "10", "--total", "10"], 2, "all together, not"),
        (["--budget", "soon"], 2, "such as 90s"),
        (["--budget", "0"], 2, "at least a second"),
        (["--d-model", "64"], 2, "go together"),
        (["--from-module", "nonsense"], 1, "package.module:factory"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], code: int, reason: str, calls: list[SimpleNamespace]
) -> None:
    assert reason in srelu24("tune", "--shape", str(SMALL), *arguments, code=code).stderr
    assert calls == []


def test_records_are_shipped_shape_by_shape(one_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    export = cli_tune.Database.export

    def counted(self: Any, path: Path) -> int:
        seen.append(export(self, path))
        return seen[-1]

    monkeypatch.setattr(cli_tune.Database, "export", counted)
    folder = tmp_path / "tuning_db"
    shapes = ["--shape", str(SMALL), "--shape", "512x512x1024"]
    srelu24("tune", *shapes, "--budget", "5", "--ship", str(folder))
    assert seen == [2, 4]
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    assert files == ["sm_90a/h200/gemm_relu2_24_bf16.json", "sm_90a/h200/spgemm_bf16.json"]
    assert len(records.read_records(folder)) == 4


def test_a_training_step_ships_a_file_per_family_and_is_listed(one_gpu: None, tmp_path: Path) -> None:
    folder = tmp_path / "tuning_db"
    arguments = ["--shape", str(SMALL), "--pass", "all", "--total", "20", "--ship", str(folder), "--json"]
    out = srelu24("tune", *arguments)
    assert "2 tuned, 0 tuned before, 0 failed" in out.stderr
    rows = json.loads(out.stdout)
    assert [(row["which"], len(row["report"]["records"])) for row in rows] == [("forward", 2), ("backward", 5)]
    training = {
        "gemm_relu2_24_bf16_count_tokens_permuted",
        "spgemm_bf16_permuted",
        "gemm_drelu2_24_bf16_tokens_permuted",
        "spgemm_tokens_bf16",
        "spgemm_tokens_bf16_transposed",
    }
    assert {path.stem for path in folder.rglob("*.json")} == training | {"gemm_relu2_24_bf16", "spgemm_bf16"}
    listed = {row["family"]["op"] for row in json.loads(srelu24("db", "list", "--json").stdout) if row["m"] == SMALL.m}
    assert listed >= {"gemm_relu2_24", "spgemm", "gemm_drelu2_24"}


def test_a_shape_that_fails_ends_with_1(one_gpu: None) -> None:
    result = srelu24("tune", "--shape", str(SMALL), "--shape", "8x12x64", "--budget", "5", code=1)
    assert "1 tuned, 0 tuned before, 1 failed" in result.stderr
    assert "multiple of 8" in result.stderr


@pytest.mark.parametrize(("gpus", "count", "code", "reason"), [("2", 2, 1, "has 2"), ("0,x", 2, 2, "neither all nor")])
def test_gpus_that_are_not_there(
    gpus: str, count: int, code: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert reason in srelu24("tune", "--shape", str(SMALL), "--gpus", gpus, code=code).stderr


@pytest.mark.parametrize(("gpus", "devices"), [("all", [0, 1, 2]), ("2,0,2", [2, 0]), ("1", [1])])
def test_one_runner_per_gpu(gpus: str, devices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from srelu24.tuning import tuner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(tuner, "GpuRunner", lambda device: device.index)
    assert cli_tune._runners(gpus) == devices


def test_without_a_gpu_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpus in ("0", "all"):
        stderr = srelu24("tune", "--shape", "128x256x512", "--gpus", gpus, code=1).stderr
        assert "PyTorch sees none; run `srelu24 doctor`" in stderr
        assert "Traceback" not in stderr
