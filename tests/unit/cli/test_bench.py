"""``srelu24 bench``: what is measured, and where the results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import SMALL, srelu24
from srelu24.bench import results
from srelu24.cli import doctor, live
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType
from srelu24_gen.target import target_by_key

H200 = target_by_key("h200")


@pytest.fixture(autouse=True)
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))


def test_bench_sweep_and_tuning_write_below_the_gpu_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(live, "benchmark", lambda *given: calls.append(given))
    monkeypatch.setattr(live, "benchmark_tuning", lambda *given: calls.append(given))
    monkeypatch.setattr(doctor, "this_gpu", lambda: H200)
    where = ["--results", str(tmp_path)]
    srelu24("bench", "sweep", "--model", "nanochat", "--tokens", "16,64", "--seconds", "1.5", *where)
    shapes = [Shape(m, 768, 3072) for m in (16, 64)]
    assert calls.pop() == ("sweep", shapes, DType.BF16, [0.1], tmp_path / "h200" / "sweep.json", 1.5)
    srelu24("bench", "sweep", "--model", "nanochat")
    assert [s.m for s in calls.pop()[1]] == [2**i for i in range(4, 16)]
    tuning = ["bench", "tuning", "--model", "nanochat", "--tokens", "16,64"]
    srelu24(*tuning, "--held-out", "32", "--held-out-model", "minitron-4b", "--tune-seconds", "9", *where)
    held = [Shape(32, 3072, 9216)]
    assert calls.pop() == (shapes, held, DType.BF16, 0.1, 3.0, 9.0, tmp_path / "h200" / "tuning.json", Pass.FORWARD)
    srelu24(*tuning, "--pass", "backward", *where)
    assert calls.pop()[-2:] == (tmp_path / "h200" / "tuning_step.json", Pass.BACKWARD)
    monkeypatch.setattr(live, "benchmark_search", lambda *given: calls.append(given))
    srelu24("bench", "search", "--model", "nanochat", "--tokens", "16,64", "--cold", "40", "--warm", "9", *where)
    assert calls.pop() == (shapes, DType.BF16, 0.1, (40.0, 9.0), tmp_path / "h200" / "search.json", Pass.FORWARD)
    srelu24("bench", "tuning", "--held-out", "32", *where)
    assert calls.pop()[:2] == ([], [Shape(32, 6144, 24576)]), "of nemotron-4-15b"
    assert "which shape?" in srelu24("bench", "tuning", "--held-out", "", code=2).stderr
    srelu24(*tuning, "--held-out", "")
    assert calls.pop()[1] == []
    assert "4096,16384" in srelu24(*tuning, "--held-out", "many", code=2).stderr


def test_bench_writes_below_the_gpu_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srelu24.bench import forward

    ours = results.Candidate(ms=1.5, tflops=700.0, joules=None, sm_mhz=None, watts=None, samples=9)
    row = results.Row(
        op="ffn_forward",
        dtype="bf16",
        shape=str(SMALL),
        density=0.1,
        candidates={"srelu24": ours, "torch_compile": ours},
        speedup={"torch_compile": 1.25},
        speed_of_light=0.9,
    )
    calls: list[Any] = []

    def bench_ffn(
        shapes: Any,
        dtype: DType,
        densities: Any,
        *,
        seconds_per_shape: float,
        json_path: Path,
        on_event: Any,
        activation: Any,
    ) -> results.BenchFile:
        assert activation == "relu2"
        calls.append((shapes, dtype, densities, seconds_per_shape, json_path))
        on_event(forward.BenchEvent("progress", "timing", 0.5))
        return results.BenchFile(env={}, rows=[row])

    monkeypatch.setattr(forward, "bench_ffn", bench_ffn)
    monkeypatch.setattr(doctor, "this_gpu", lambda: H200)
    out = srelu24("bench", "ffn", "--shape", str(SMALL), "--density", "0.1", "--results", str(tmp_path)).stdout
    assert calls == [([SMALL], DType.BF16, [0.1], 20.0, tmp_path / "h200" / "ffn_bf16.json")]
    assert f"ffn_forward {SMALL} bf16, density 10%" in out
    (line,) = (line for line in out.splitlines() if "torch_compile" in line)
    assert line.endswith(" 1.250x")
