"""A machine with a bundle and no compiler: what was packed runs, all else is dense, with a warning and a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import made_up_compiler
import srelu24
from made_up_compiler import machine, no_toolchain
from srelu24.fp8 import ops as fp8_ops
from srelu24.numerics import reference
from srelu24.ops import library
from srelu24.runtime import dispatch, fallback
from srelu24.runtime.fallback import FallbackWarning
from srelu24.shipping import bundle
from srelu24_gen import compile as compiler
from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import Activation, DType
from srelu24_gen.target import TARGETS
from stubbed_gpu import OnGpu, stubbed

H200 = TARGETS["h200"]
FEW, MANY = 64, 4096  # apart by so much that every kernel is another
D, F = 320, 832
REASON = "is in no bundle that was loaded, and nothing here can compile it"


@pytest.fixture
def bundles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """Of few tokens, without biases: inference in 16 and in 8 bits, and a training step."""
    made_up_compiler.install(monkeypatch)
    machine(tmp_path / "there", monkeypatch)
    files = {}
    for name, dtype, which in (
        ("bf16", DType.BF16, Pass.FORWARD),
        ("e4m3", DType.E4M3, Pass.FORWARD),
        ("step", DType.BF16, Pass.BACKWARD),
    ):
        files[name] = tmp_path / f"{name}.zip"
        bundle.pack(files[name], [Shape(FEW, D, F)], dtype, H200, passes=(which,))
    return files


@pytest.fixture
def launches(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
    """What is launched on another machine, without compiler and records, that has loaded those of inference."""
    fallback.warn_again()
    machine(tmp_path / "here", monkeypatch)
    no_toolchain(monkeypatch)
    for name in ("bf16", "e4m3"):
        bundle.load(bundles[name])
    done: list[object] = []
    with stubbed(monkeypatch, H200, compiler.build, lambda *_: done.append(None)):
        yield done


def layer(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, w1, w2."""
    random = torch.Generator().manual_seed(m)
    return tuple(
        torch.randn(size, generator=random).mul(size[-1] ** -0.5).bfloat16() for size in ((m, D), (F, D), (D, F))
    )


def dense(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return linear(linear(x, w1).relu().square(), w2)


def warned(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives that warns the first time, and only then."""
    with pytest.warns(FallbackWarning, match=REASON):
        y = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(), y)
    return y


def test_what_was_packed_runs(launches: list[object]) -> None:
    x, w1, w2 = layer(FEW)
    library._ffn_cuda(x, w1, w2, None, None, "sparse")
    library._ffn_cuda(x[:3], w1, w2, None, None, "batch")
    assert len(launches) == 4
    assert srelu24.explain(x.as_subclass(OnGpu), w1, w2, mode="sparse").runs == "kernels"


def test_more_tokens_than_were_packed_run_dense(launches: list[object]) -> None:
    x, w1, w2 = layer(MANY)
    y = warned(lambda: library._ffn_cuda(x, w1, w2, None, None, "sparse"))
    assert torch.equal(y, dense(x, w1, w2))
    assert not launches
    told = srelu24.explain(x.as_subclass(OnGpu), w1, w2, mode="sparse")
    assert (told.runs, told.kernels) == ("dense", ())
    assert REASON in told.why


def test_batch_invariant_results_are_refused(launches: list[object]) -> None:
    x, w1, w2 = layer(MANY)
    with pytest.raises(Unsupported, match=REASON):
        library._ffn_cuda(x, w1, w2, None, None, "batch")
    told = srelu24.explain(x.as_subclass(OnGpu), w1, w2, deterministic="batch")
    assert told.runs == "nothing"


@pytest.mark.parametrize("way", ["mixed", "gemm"])
def test_our_dense_gemms_become_pytorch_s(way: str, launches: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ffn_way", lambda *_: way)
    x, w1, w2 = layer(MANY)
    assert torch.equal(warned(lambda: library._ffn_cuda(x, w1, w2, None, None, "auto")), dense(x, w1, w2))
    assert not launches


def test_single_operations(launches: list[object]) -> None:
    x, w1, w2 = layer(MANY)
    y = warned(lambda: library._linear_cuda(x, w1, None, "relu2"))
    assert torch.equal(y, linear(x, w1).relu().square())
    s, residual = reference.gemm_relu2_24(x, w1), x
    y = warned(lambda: library._matmul_cuda(s.values, s.metadata, w2, None, residual))
    assert torch.equal(y, linear(s.to_dense(), w2) + residual)
    assert not launches
    with pytest.raises(ToolchainError, match=REASON):  # what is packed has no dense form
        library._gemm_24_cuda(Activation.RELU2, x, w1, None)


def test_pruning_on_its_own(launches: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.srelu24, "sparsify24", library._sparsify24_cuda)
    x, w1, w2 = (t.half() for t in layer(MANY))  # fp16 was not packed
    a = linear(x, w1).relu().square()
    assert torch.equal(warned(lambda: srelu24.linear24(a, w2, mode="sparse")), linear(a, w2))


def test_while_a_graph_is_captured(launches: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x, w1, w2 = layer(MANY)
    assert torch.equal(warned(lambda: library._ffn_cuda(x, w1, w2, None, None, "sparse")), dense(x, w1, w2))


@pytest.mark.parametrize("recipe", ["rowwise", "predicted"])
def test_8_bits(recipe: str, launches: list[object]) -> None:
    x, w1, w2 = layer(MANY)
    q1, q2 = srelu24.quantize_weight(w1), srelu24.quantize_weight(w2)
    operands = (q1.values, q1.scale, q2.values, q2.scale, None, None, recipe, q1.row_norm)
    count = torch.zeros((), dtype=torch.int64)
    y = warned(lambda: fp8_ops._ffn_cuda(x, *operands, count))
    assert torch.equal(y, dense(x, q1.dequantize(x.dtype), q2.dequantize(x.dtype)))
    assert srelu24.explain(x.as_subclass(OnGpu), q1, q2, recipe=recipe).runs == "dense"
    launches.clear()
    fp8_ops._ffn_cuda(x[:FEW], *operands, count)
    assert len(launches) == {"rowwise": 4, "predicted": 3}[recipe]
    assert srelu24.explain(x[:FEW].as_subclass(OnGpu), q1, q2, recipe=recipe).runs == "kernels"


def gradients(x: Tensor, w1: Tensor, w2: Tensor, b2: Tensor | None = None, *, kernels: bool = True) -> list[Tensor]:
    recipe = srelu24.Recipe(warmup_steps=0, kernels=kernels)
    leaves = [t.clone().requires_grad_() for t in (w1, w2)]
    y = srelu24.ffn(x.as_subclass(OnGpu), *leaves, b2=b2, recipe=recipe.layer("ffn", w1))
    return [y, *torch.autograd.grad(y.sum(), leaves)]


def test_a_training_step_is_the_reference_until_it_is_packed(launches: list[object], bundles: dict[str, Path]) -> None:
    x, w1, w2 = layer(FEW)
    with pytest.warns(FallbackWarning, match=f"trains with its reference.*{REASON}"):
        ours = gradients(x, w1, w2)
    with pytest.warns(FallbackWarning, match="kernels=False"):
        expected = gradients(x, w1, w2, kernels=False)
    assert all(map(torch.equal, ours, expected))
    assert not launches
    bundle.load(bundles["step"])
    dispatch.clear_cache()
    gradients(x, w1, w2)
    assert len(launches) == 9, "GEMM1, S without dense features, Y; W2^T, dY1, both splits, dW1, dW2"
    launches.clear()
    with pytest.warns(FallbackWarning, match=f"bias.*{REASON}"):
        gradients(x, w1, w2, torch.zeros(D).bfloat16())
    assert not launches


def test_without_compiler_and_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fallback.warn_again()
    machine(tmp_path, monkeypatch)
    no_toolchain(monkeypatch)
    x, w1, w2 = layer(FEW)
    with (
        stubbed(monkeypatch, H200, compiler.build),
        pytest.warns(FallbackWarning, match="runs dense: there is no NVRTC. srelu24.explain"),
    ):
        assert torch.equal(library._ffn_cuda(x, w1, w2, None, None, "sparse"), dense(x, w1, w2))
