"""What the 8-bit candidates of a benchmark are held to is the reference's own forward, and for dense ones float32."""

from __future__ import annotations

import pytest
import torch

import srelu24
from srelu24.bench import peers_fp8
from srelu24.bench.peers import relative_error
from srelu24.bench.peers_fp8 import Fp8Case
from srelu24.fp8 import quantize
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType


@pytest.fixture(scope="module")
def case() -> Fp8Case:
    made = Fp8Case.make(Shape(70, 64, 256), DType.BF16, 0.3, "cpu")
    assert isinstance(made, Fp8Case)
    return made


def test_the_sparse_answer_is_the_row_wise_forward(case: Fp8Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_fp8, "_CHUNK_ROWS", 64)
    y = srelu24.ffn(case.x, case.q1, case.q2, recipe="rowwise")
    assert torch.equal(case.y_sparse.bfloat16(), y)
    for recipe in ("predicted", srelu24.Static(float(case.amax.max()))):
        other = srelu24.ffn(case.x, case.q1, case.q2, recipe=recipe)
        assert relative_error(other, case.y_sparse) < peers_fp8.TOLERANCE


def test_the_dense_answer_is_that_of_torchs_row_wise_gemms(case: Fp8Case) -> None:
    y = case.x.float()
    for weight in (case.q1, case.q2):
        rows = quantize.quantize_rows(y)
        y = (rows.values.float() @ weight.values.float().T) * weight.scale * rows.scale[:, None]
        y = y.bfloat16().float()
        if weight is case.q1:
            y = y.relu().square().bfloat16().float()
    assert relative_error(y, case.y_dense8) < 0.01


def test_unscaled_times_the_scales_is_the_sparse_answer(case: Fp8Case) -> None:
    scaled = case.unscaled * case.q2.scale * quantize.scale(case.amax)[:, None]
    torch.testing.assert_close(scaled, case.y_sparse, rtol=1e-5, atol=1e-6)


def test_without_a_gpu_the_benchmark_says_so() -> None:
    from srelu24.bench import forward

    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="PyTorch sees none"):
            forward.bench_fp8([Shape(64, 64, 256)])
