"""A bundle holds every kernel that calls of its widths ask the build store for; what it lacks ends in a fallback."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import made_up_compiler
import srelu24
from made_up_compiler import machine
from srelu24.fp8 import kernels as fp8_kernels
from srelu24.fp8.operands import FfnOperands
from srelu24.ops import explanation, library
from srelu24.runtime import dense, fallback
from srelu24.runtime.dispatch import MODES
from srelu24.shipping import bundle
from srelu24_gen import paths
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, Family, Op
from srelu24_gen.target import TARGETS
from stubbed_gpu import OnGpu, stubbed

H200 = TARGETS["h200"]
SHIPPED = paths.shipped_records_dir()
RECORDED, UNRECORDED = Shape(2048, 768, 3072), Shape(2048, 832, 2560)
TOKENS = (1, 17, 64, 65, 200, 384, 520, 1000, 2048)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fallback.warn_again()
    return made_up_compiler.install(monkeypatch)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Family]]:
    """What the build store was asked for, on a machine that knows what ships and what was loaded."""
    names: dict[str, Family] = {}

    def no_gemm(a: Tensor, w: Tensor, *_: object) -> Tensor:
        return a.new_empty(a.shape[0], w.shape[0])

    machine(tmp_path, monkeypatch, SHIPPED)
    monkeypatch.setattr(dense, "linear", no_gemm)
    monkeypatch.setattr(dense, "library_gemm", no_gemm)
    with stubbed(monkeypatch, H200, lambda spec: names.update({spec.name: spec.family})):
        yield names


def pack(
    path: Path, *shapes: Shape, dtype: DType = DType.BF16, which: Pass = Pass.FORWARD, bias: bool = True
) -> set[str]:
    """The names of the kernels in a bundle made here."""
    bundle.pack(path, shapes, dtype, H200, passes=(which,), bias=bias)
    with zipfile.ZipFile(path) as archive:
        files = json.loads(archive.read("manifest.json"))["files"]
    return {name.split("/")[1].rpartition("-")[0] for name in files if name.startswith("kernels/")}


def tensors(shape: Shape, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> tuple[Tensor | None, ...]:
    """x, w1, w2, b1, b2."""
    m, d, f = shape
    x, w1, w2, b1, b2 = (torch.zeros(size, dtype=dtype) for size in ((m, d), (f, d), (d, f), (f,), (d,)))
    return x, w1, w2, *((b1, b2) if bias else (None, None))


@pytest.mark.parametrize("shape", [RECORDED, UNRECORDED], ids=str)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
def test_inference(shape: Shape, dtype: DType, asked: dict[str, Family], tmp_path: Path) -> None:
    packed = pack(tmp_path / "b.zip", shape, dtype=dtype)
    kind = torch.bfloat16 if dtype is DType.BF16 else torch.float16
    for m, bias in itertools.product(TOKENS, (False, True)):
        x, w1, w2, b1, b2 = tensors(shape._replace(m=m), kind, bias)
        for mode in (*MODES, "batch"):
            library._ffn_cuda(x, w1, w2, b1, b2, mode)
        for way in dense.WAYS:
            dense.ffn(way, x, w1, w2, b1, b2)
        for activation in ("relu2", "none"):
            values, metadata = library._sparsify24_cuda(x.new_empty(m, shape.f), activation)
        library._matmul_cuda(values, metadata, w2, b2, None)
    assert set(asked) <= packed
    assert {f.op for f in asked.values()} == {Op.GEMM, Op.GEMM_RELU2_24, Op.SPGEMM, Op.SPARSIFY24}
    for m, mode in itertools.product(range(1, shape.m, 37), (*MODES, "batch")):
        told = explanation.explain_kernels(shape._replace(m=m), dtype, True, False, H200, mode)
        assert {k.spec.name for k in told.kernels} <= packed, m


def test_records_that_come_along_count_as_given(asked: dict[str, Family], tmp_path: Path) -> None:
    packed = pack(tmp_path / "b.zip", RECORDED._replace(m=64), bias=False)
    for m in (*TOKENS, 12345, 16384):
        for mode in MODES:
            told = explanation.explain_kernels(RECORDED._replace(m=m), DType.BF16, False, False, H200, mode)
            assert {k.spec.name for k in told.kernels} <= packed, m


def test_8_bits(asked: dict[str, Family], tmp_path: Path) -> None:
    packed = pack(tmp_path / "b.zip", RECORDED, dtype=DType.E4M3)
    x, w1, w2, *biases = tensors(RECORDED)
    q1, q2 = srelu24.quantize_weight(w1), srelu24.quantize_weight(w2)
    saturated = torch.zeros((), dtype=torch.int64)
    for m, (b1, b2) in itertools.product(TOKENS, ((None, None), biases)):
        weights = (q1.values, q1.scale, q2.values, q2.scale)
        for recipe, basis in (("rowwise", q1.row_norm), ("predicted", q1.row_norm), ("static", torch.ones(2))):
            fp8_kernels.forward(FfnOperands(x[:m], *weights, b1, b2, recipe, basis, saturated))
        fp8_kernels.row_amax(x[:m], q1.values, q1.scale, b1)
    assert set(asked) <= packed
    assert {*asked.values()} == families(RECORDED, DType.E4M3, Pass.FORWARD)


@pytest.mark.parametrize("shape", [RECORDED._replace(m=208), UNRECORDED._replace(m=1040)], ids=str)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
def test_training(shape: Shape, dtype: DType, asked: dict[str, Family], tmp_path: Path) -> None:
    packed = pack(tmp_path / "b.zip", shape, dtype=dtype, which=Pass.BACKWARD)
    kind = torch.bfloat16 if dtype is DType.BF16 else torch.float16
    for m, bias in ((16, False), (shape.m, True)):
        for buffers in (None, torch.float32, kind):
            train(shape._replace(m=m), kind, bias, buffers)
    assert set(asked) <= packed
    assert {*asked.values()} == families(shape, dtype, Pass.BACKWARD)


def families(shape: Shape, dtype: DType, which: Pass) -> set[Family]:
    from srelu24.shipping import catalogue

    return {p.family for p in catalogue.problems(shape, dtype, (which,), bias=True)}


def train(shape: Shape, dtype: torch.dtype, bias: bool, buffers: torch.dtype | None) -> None:
    """A dense step of the warm-up, and a sparse one; both watched."""
    x, *weights = tensors(shape, dtype, bias)
    recipe = srelu24.Recipe(warmup_steps=1)
    layer = recipe.layer("ffn", weights[0])
    leaves = [t.requires_grad_() for t in weights if t is not None]
    if buffers is not None:
        layer.accumulate_into(*(torch.zeros_like(w, dtype=buffers, requires_grad=False) for w in leaves[:2]))
    for sparse in (False, True):
        assert recipe.sparse is sparse
        with recipe.watch():
            y = srelu24.ffn(x.as_subclass(OnGpu).requires_grad_(), *weights, recipe=layer)
            y.sum().backward()
        with torch.no_grad():
            srelu24.ffn(x.as_subclass(OnGpu), *weights, recipe=layer)
        recipe.step()
