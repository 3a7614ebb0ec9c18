"""explain() says what ffn() does, in words a person can use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import srelu24
from srelu24.db.database import Database
from srelu24.db.records import Evidence, TuningRecord
from srelu24.ops import explanation
from srelu24.ops.explanation import Explanation, explain_kernels
from srelu24.runtime import dispatch
from srelu24_gen import paths
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, Op, Problem
from srelu24_gen.target import TARGETS

D, F = 16, 32


def weights(dtype: torch.dtype = torch.bfloat16, d: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(F, d, dtype=dtype), torch.zeros(d, F, dtype=dtype)


def x(dtype: torch.dtype = torch.bfloat16, d: int = D) -> torch.Tensor:
    return torch.zeros(2, 3, d, dtype=dtype)


def test_on_a_cpu_the_reference_runs() -> None:
    found = srelu24.explain(x(), *weights())
    assert (found.runs, found.kernels) == ("reference", ())
    assert str(found) == "runs: reference (x is on cpu; the kernels need a CUDA device)"


def test_a_type_or_width_without_kernels_is_named() -> None:
    found = srelu24.explain(x(torch.float32), *weights(torch.float32))
    assert found.runs == "dense"
    assert "torch.float32" in found.why
    found = srelu24.explain(x(d=12), *weights(d=12))
    assert found.runs == "dense"
    assert "width of 12" in found.why


def test_gradients_are_named_only_while_they_are_recorded() -> None:
    w1, w2 = weights()
    w1.requires_grad_()
    found = srelu24.explain(x(), w1, w2)
    assert found.runs == "dense"
    assert "no_grad" in found.why
    with torch.no_grad():
        assert srelu24.explain(x(), w1, w2).runs == "reference"


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Unsupported, match="w2 has shape"):
        srelu24.explain(x(), weights()[0], weights()[0])
    w1, w2 = weights()
    with pytest.raises(Unsupported, match=r"explain knows inference only"):
        srelu24.explain(x(), w1, w2, recipe=srelu24.Recipe().layer("a", w1))


def test_the_text_names_kernels_and_where_their_configurations_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "shipped_records_dir", lambda: tmp_path / "shipped")
    dispatch.clear_cache()
    gemm1 = Problem(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), 4096, 16384, 4096)
    gemm2 = Problem(Family(Op.SPGEMM, DType.BF16), 4096, 4096, 16384)
    evidence = Evidence(ms=0.5, default_ms=0.6, samples=9, source_digest="d", when="2026-01-01T00:00:00Z")
    Database.open().put(
        TuningRecord(
            family=gemm2.family,
            m=4096,
            n=4096,
            k=16384,
            arch="sm_90a",
            gpu="h200",
            config=KernelConfig(stages=3, raster_group=4).to_dict(),
            density=0.1,
            evidence=evidence,
        )
    )
    try:
        kernels = tuple(explanation._explain_kernel(problem, TARGETS["h200"]) for problem in (gemm1, gemm2))
    finally:
        dispatch.clear_cache()
    lines = str(Explanation("kernels", "NVIDIA H200, sm_90a", kernels)).splitlines()
    assert lines[0] == "runs: kernels (NVIDIA H200, sm_90a)"
    assert lines[1:4] == [
        "  gemm_relu2_24_bf16 4096x16384x4096",
        f"    kernel  {kernels[0].spec.name}, raster group {kernels[0].spec.config.raster_group}",
        "    config  from default: default for this size, untuned: no record helps",
    ]
    assert lines[4:] == [
        "  spgemm_bf16 4096x4096x16384",
        "    kernel  spgemm_bf16_sm_90a_128x256x64_c2_s3_wg, raster group 4",
        "    config  from exact: tuned for this very problem on this GPU",
        "    record  0.5 ms measured 2026-01-01T00:00:00Z",
    ]


def test_a_gpu_without_native_kernels_is_told_so() -> None:
    found = explain_kernels(Shape(4096, 4096, 16384), DType.BF16, True, False, TARGETS["a100"], "sparse")
    assert found.why == "NVIDIA A100-SXM4-80GB, sm_80, portable kernels (mma.sync); sparse was asked for"
    assert [kernel.spec.arch for kernel in found.kernels] == ["sm_80", "sm_80"]
    assert {kernel.choice.source for kernel in found.kernels} == {"default"}
    assert "untuned" in str(found)


def test_the_portable_kernels_on_hopper_are_told_apart() -> None:
    shape = Shape(4096, 4096, 16384)
    texts = [
        str(explain_kernels(shape, DType.BF16, False, False, target, "sparse"))
        for target in (TARGETS["h200"], TARGETS["h200"].portable)
    ]
    assert "sm_90a, native kernels (wgmma)" in texts[0]
    assert "sm_90, portable kernels (mma.sync)" in texts[1]
    assert "untuned" in texts[1], "records of the native kernels do not answer for the portable ones"
