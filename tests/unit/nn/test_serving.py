"""warmup(): what runs afterwards finds its kernels built and loaded. A made-up GPU and compiler, without records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import made_up_compiler
import srelu24
from srelu24.fp8 import kernels as fp8_kernels
from srelu24.fp8.operands import FfnOperands
from srelu24.fp8.recipes import ScaleRecipe
from srelu24_gen import compile as compiler
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import KernelSpec
from srelu24_gen.target import TARGETS
from stubbed_gpu import OnGpu, stubbed

M, D, F = 64, 320, 832


class Machine:
    """What has been compiled, and what has been loaded, in order."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.loaded: list[KernelSpec] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    done = Machine()

    def build(spec: KernelSpec) -> compiler.BuiltKernel:
        done.loaded.append(spec)
        return compiler.build(spec)

    done.compiled = made_up_compiler.install(monkeypatch)
    made_up_compiler.machine(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    with stubbed(monkeypatch, TARGETS["h200"], build):
        yield done


def layer(bias: bool = False, **options: object) -> srelu24.SquaredReLUFFN:
    """An FFN whose weights say that they are on the GPU."""
    made = srelu24.SquaredReLUFFN(D, F, bias, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    for child in (made.up, made.down):
        for name, parameter in list(child.named_parameters()):
            setattr(child, name, nn.Parameter(parameter.detach().as_subclass(OnGpu)))
    return made


def tokens(m: int = M) -> Tensor:
    return torch.randn(m, D).bfloat16().as_subclass(OnGpu)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 1], ids=["sparse", "dense"])
def test_training_steps_find_their_kernels(warmup_steps: int, bias: bool, gpu: Machine) -> None:
    recipe = srelu24.Recipe(warmup_steps=warmup_steps)
    ffn = layer(bias, recipe=recipe)
    (warmed,) = srelu24.warmup(ffn, tokens=M)
    assert warmed.explanation is not None
    assert warmed.explanation.runs == "kernels"
    assert ("dense, in its warm-up" if warmup_steps else "now sparse") in warmed.explanation.why
    named = {kernel.spec for kernel in warmed.explanation.kernels}
    assert set(gpu.loaded) == named
    assert set(gpu.compiled) == {spec.name for spec in named}
    assert recipe.layers["0"].rows == 0, "warming up counts no tokens"
    before = len(gpu.loaded), len(gpu.compiled)

    for buffers in (False, True):  # dense, then sparse
        if buffers:
            recipe.layers["0"].accumulate_into(torch.zeros(F, D), torch.zeros(D, F))
        ffn(tokens()).sum().backward()
        recipe.step()
        ffn(tokens()).sum().backward()
    assert (len(gpu.loaded), len(gpu.compiled)) == before


def test_a_step_that_the_kernels_do_not_take_says_so(gpu: Machine) -> None:
    recipe = srelu24.Recipe()
    (warmed,) = srelu24.warmup(layer(recipe=recipe), tokens=5)
    assert str(warmed.explanation).startswith("runs: reference (by a training recipe; M = 5, D = 320, F = 832 are not")
    (without,) = srelu24.warmup(layer(recipe=srelu24.Recipe(kernels=False)), tokens=M)
    assert str(without.explanation) == "runs: reference (by a training recipe; the recipe says kernels=False)"
    assert not gpu.compiled


def test_a_layer_of_a_recipe_is_not_taken_for_one_without(gpu: Machine) -> None:
    model = nn.ModuleList([layer(), layer(recipe=srelu24.Recipe()), layer(recipe=srelu24.Recipe(kernels=False))])
    told = srelu24.warmup(model, tokens=M)
    assert [warmed.explanation.why.count("training recipe") for warmed in told if warmed.explanation] == [0, 1, 1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", ["rowwise", "predicted", srelu24.Static(2.0)], ids=str)
def test_8_bit_calls_find_their_kernels(recipe: ScaleRecipe | str, bias: bool, gpu: Machine) -> None:
    ffn = layer(bias, recipe=recipe)
    (warmed,) = srelu24.warmup(ffn, tokens=M)
    assert warmed.explanation is not None
    assert {kernel.spec.name for kernel in warmed.explanation.kernels} == set(gpu.compiled)
    before = len(gpu.compiled)
    q1, q2 = srelu24.quantize_weight(ffn.up.weight.detach()), srelu24.quantize_weight(ffn.down.weight.detach())
    assert isinstance(ffn.recipe, ScaleRecipe)
    static = isinstance(ffn.recipe, srelu24.Static)
    fp8_kernels.forward(
        FfnOperands(
            x=tokens(),
            w1=q1.values,
            w1_scale=q1.scale,
            w2=q2.values,
            w2_scale=q2.scale,
            b1=ffn.up.bias,
            b2=ffn.down.bias,
            recipe=ffn.recipe.name,
            basis=torch.ones(2) if static else q1.row_norm,
            saturated=torch.zeros((), dtype=torch.int64),
        )
    )
    assert gpu.loaded
    assert len(gpu.compiled) == before


def test_a_static_recipe_without_a_scale_is_refused_before_anything_is_compiled(gpu: Machine) -> None:
    with pytest.raises(Unsupported, match=r"no scale yet; run srelu24.calibrate"):
        srelu24.warmup(nn.ModuleList([layer(), layer(recipe="static")]), tokens=M)
    assert not gpu.compiled
