"""The benchmark of the training step, on played kernels: every candidate computes what its row says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from srelu24.bench import step
from srelu24.bench.results import BenchFile
from srelu24.bench.step import StepCase
from srelu24.documents import registry
from srelu24.training import kernels
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelConfig, Producer
from srelu24_gen.target import TARGETS

SHAPE = Shape(64, 64, 256)
CONFIGS = [KernelConfig(), KernelConfig(tile_m=192, producer=Producer.THREAD)]


@pytest.fixture
def case(played: None) -> StepCase:
    return StepCase.make(SHAPE, DType.BF16, 0.3, "cpu")


def test_the_case_is_past_its_warm_up_and_ranked(case: StepCase) -> None:
    assert case.layer.recipe.sparse
    density = (case.data.x.float() @ case.data.w1.float().T > 0).sum(dim=0)
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[case.layer.dense_features] = True
    assert density[chosen].min() >= density[~chosen].max()


def test_whole_steps_give_the_gradients(case: StepCase) -> None:
    x, w1, w2 = (t.detach().requires_grad_() for t in (case.data.x, case.data.w1, case.data.w2))
    y = linear(linear(x, w1).relu().square(), w2)
    expected = torch.autograd.grad(y, (x, w1, w2), case.g)
    for name, call in step.whole_steps(case, compile_dense=lambda f: f).items():
        gradients = call()
        assert len(gradients) == 3
        for ours, dense in zip(gradients, expected, strict=True):
            difference = (ours - dense).norm() / dense.norm()
            assert difference == 0 if name != "srelu24" else 0 < difference < 0.5


def test_parts_and_cublas_compute_the_same(case: StepCase) -> None:
    for op, (flops, calls) in step.parts(case).items():
        ours = calls["srelu24"]()
        assert (flops > 0) == ("cublas" in calls)
        if op in ("step_y", "step_dx"):
            dense = calls["cublas"]()
            assert ours.shape == dense.shape
            rows = [4 * (r % 16) + r // 16 for r in range(64)]  # the widest stride is 64 / 16
            torch.testing.assert_close(ours[rows], dense, rtol=2e-2, atol=2e-2)
        elif op in ("step_dw1", "step_dw2"):
            assert ours.shape == calls["cublas"]().shape
        elif op == "step_split_columns":
            assert ours.shape == (64, 64)


def test_saved_memory_is_counted_once_and_without_the_inputs() -> None:
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    assert step.saved_bytes(lambda: linear(x, w), [x, w]) == 0
    assert step.saved_bytes(lambda: linear(x, w).relu(), [x, w]) == 8 * 32 * 4
    assert step.saved_bytes(lambda: linear(x, w).relu().square(), [x, w]) == 8 * 32 * 4


def test_a_file_with_its_tables(played: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "whole_steps", partial(step.whole_steps, compile_dense=lambda f: f))
    monkeypatch.setattr(step, "SPLIT_SHAPE", SHAPE)
    monkeypatch.setattr(step, "SPLIT_SHARES", (0.0, 0.5, 1.0))
    path = tmp_path / "train.json"
    said: list[str] = []
    file = step.bench_step(
        [SHAPE], DType.BF16, [0.3], seconds_per_shape=0.01, json_path=path, on_event=said.append, device="cpu"
    )
    assert BenchFile.load(path).rows == file.rows
    assert len(said) == len(file.rows)
    assert {row.op for row in file.rows} >= {"ffn_step", "step_dw1", "step_transpose", "split_gemm"}
    ours = file.rows[0].candidates["srelu24"]
    # S in both packed forms, 16 bits an element, with E padded to blocks of 64 x 256: 2 x 64 x 256 / 2 values.
    assert ours.saved_bytes == 64 * 256 * 2 + 64 * 256 // 8 + 256 * 256 // 8
    tables = registry.of_results(tmp_path)
    assert "| bf16 | 64x64x256 | 30% |" in tables["step"]
    assert "| dw1 | bf16 | 64x64x256 | 30% |" in tables["step_parts"]
    assert "| bf16 | 64x64x256 | 50% |" in tables["split"]


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bench in (
        lambda: step.bench_step([SHAPE], DType.BF16),
        lambda: step.bench_configs(SHAPE, DType.BF16),
    ):
        with pytest.raises(Unsupported, match="PyTorch sees none"):
            bench()
    with pytest.raises(Unsupported, match="do not take 64x64x256: the tensors are not on a GPU"):
        StepCase.make(SHAPE, DType.BF16, 0.3, "cpu")
    with pytest.raises(Unsupported, match="at least one shape"):
        step.bench_step([], DType.BF16)


def test_configurations_are_timed_with_their_own_kernel(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "gpu_of", lambda _: TARGETS["h200"])
    monkeypatch.setattr(step, "build_many", lambda specs: [None] * len(specs))
    monkeypatch.setattr(step.space, "candidates", lambda problem, target: CONFIGS)
    used = set()
    real = kernels.weight_gradient

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        used.add(kernels._fixed.get())
        return real(*args, **kwargs)

    monkeypatch.setattr(kernels, "weight_gradient", spy)
    rows = step.bench_configs(SHAPE, DType.BF16, 0.3, seconds=0.05, device="cpu")
    assert [row.op for row in rows] == [f"config_{part}" for part in ("hidden", "y", "hidden_gradient", "dw1", "dw2")]
    assert all(sorted(row.speedup) == ["128x256x64_c2_s4_wg_g8", "192x256x64_c2_s4_th_g8"] for row in rows)
    assert used == set(CONFIGS)
    assert kernels._fixed.get() is None
