"""Recipes of converted models, on a GPU"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import srelu24
import srelu24.ops.functions  # registers all ops
from srelu24.fp8 import kernels
from srelu24.fp8.quantize import E4M3
from srelu24_gen.errors import Unsupported

pytestmark = pytest.mark.usefixtures("fresh_compiler")

D, F = 256, 1024
TOKENS = (300, 64, 128, 257, 512)
RECIPES = ("rowwise", "predicted", "static")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


PROBLEMS = [
    problem
    for m in TOKENS
    for recipe in RECIPES
    for problem in kernels.problems(recipe, empty(m, D), empty(F, D, dtype=E4M3), empty(D, F, dtype=E4M3), None, None)
]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c_proj(torch.relu(self.c_fc(hidden)).square())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.mlps = nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(hidden=norm(x))
        return x


@pytest.fixture
def net(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(device, torch.bfloat16).eval()


@pytest.fixture
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", srelu24.FallbackWarning)
        yield


def tokens(m: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, m, D, generator=torch.Generator().manual_seed(m)).to(device, dtype)


def distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def calibrated(net: nn.Module, recipe: str, x: Tensor) -> None:
    assert len(srelu24.convert(net, recipe=recipe).converted) == 2
    if recipe == "static":
        srelu24.calibrate(net, [x])


# ------------------------------------------------------------------------------------------------------------- 8-bit


@pytest.mark.parametrize("recipe", RECIPES)
def test_converted_to_8_bits(recipe: str, net: nn.Module, device: torch.device, no_fallback: None) -> None:
    """convert(model, recipe=) runs the 8-bit kernels: near the masked model, and sees that weights have changed."""

    def masked(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        groups = args[0].unflatten(-1, (-1, 4))
        kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
        return ((groups * torch.zeros_like(groups).scatter_(-1, kept, 1.0)).flatten(-2),)

    x = tokens(300, device)
    with torch.no_grad():
        hooks = [mlp.c_proj.register_forward_pre_hook(masked) for mlp in net.mlps]
        expected = net(x)
        for hook in hooks:
            hook.remove()
        calibrated(net, recipe, x)
        y = net(x)
        assert 1e-3 < distance(y, expected) < 0.1
        ffn = net.mlps[0]
        assert srelu24.explain(x, ffn.up.weight, ffn.down.weight, recipe=ffn.recipe).runs == "kernels"
        ffn.up.weight.mul_(1.5)
        q1, q2 = (srelu24.quantize_weight(layer.weight) for layer in (ffn.up, ffn.down))
        assert torch.equal(ffn(x), srelu24.ffn(x, q1, q2, recipe=ffn.recipe))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_8_bits(recipe: str, mode: str, net: nn.Module, device: torch.device, no_fallback: None) -> None:
    """torch.compile(fullgraph, dynamic) of an 8-bit model, weights not quantised before: one graph for all M."""
    calibrated(net, recipe, tokens(300, device))
    twin = copy.deepcopy(net)  # its weights are others, quantised for themselves
    compiled = torch.compile(net, fullgraph=True, dynamic=True, mode=mode)
    with torch.no_grad():
        for m in TOKENS:
            x = tokens(m, device)
            for _ in range(3):  # CUDA graphs warm up, record and replay
                torch.compiler.cudagraph_mark_step_begin()
                found = compiled(x).clone()
            assert distance(found, twin(x)) < 0.05
    assert counters["stats"]["unique_graphs"] == 1


def test_threads_whose_first_call_quantises(net: nn.Module, device: torch.device) -> None:
    """Eight threads on streams of their own meet weights that nobody has quantised: the answers of one thread."""
    calibrated(net, "predicted", tokens(300, device))
    x = tokens(300, device)
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
    torch.cuda.synchronize()
    barrier = threading.Barrier(8)

    def work(_: int) -> bool:
        barrier.wait()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(device)):
            return all(torch.equal(net(x), expected) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_capture_needs_quantised_weights(net: nn.Module, device: torch.device) -> None:
    """In a CUDA graph weights cannot be quantised: one sentence; after a call the graph gives the eager answer."""
    calibrated(net, "rowwise", tokens(64, device))
    x = tokens(64, device)
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)  # builds and loads the kernels
        with pytest.raises(Unsupported, match="run the layer once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            net(x)
        torch.cuda.synchronize()
        net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_opcheck_8_bits(recipe: str, device: torch.device) -> None:
    """torch.library.opcheck of both 8-bit ops."""
    x, w1 = tokens(300, device)[0], torch.randn(F, D, device=device).bfloat16()
    w2, b1 = torch.randn(D, F, device=device).bfloat16(), torch.randn(F, device=device).bfloat16()
    static = srelu24.Static(5.0).scales_on(device) if recipe == "static" else None
    q1, q2 = srelu24.quantize_weight(w1), srelu24.quantize_weight(w2)
    basis = q1.row_norm if static is None else static
    counted = torch.zeros((), dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.srelu24.ffn_fp8_plain.default, (x, w1, w2, b1, None, recipe, static, counted))
    torch.library.opcheck(
        torch.ops.srelu24.ffn_fp8.default,
        (x, q1.values, q1.scale, q2.values, q2.scale, b1, None, recipe, basis, counted),
        test_utils="test_faketensor",  # the others compare 8-bit tensors, which PyTorch cannot
    )


# ---------------------------------------------------------------------------------------------------------- training


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    (net(x).square().mean() * 100).backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_training_recipe(net: nn.Module, device: torch.device) -> None:
    """convert(model, recipe=srelu24.Recipe()) before model.to(device): dense and sparse gradients are the CPU's."""
    net = net.float().cpu()
    there = copy.deepcopy(net)
    recipes = []
    for model in (net, there):
        recipes.append(srelu24.Recipe(warmup_steps=1, refresh=1))
        srelu24.convert(model, recipe=recipes[-1])
    there.to(device)
    assert recipes[1].layers["mlps.0"].counts.device == device
    for _ in range(3):
        x = tokens(320, torch.device("cpu"), torch.float32)
        ours, expected = gradients(there, x.to(device)), gradients(net, x)
        # Sums in another order may turn near ties of pruning, which are few.
        assert all(distance(a, b) < 0.02 for a, b in zip(ours, expected, strict=True))
        assert recipes[0].step() == recipes[1].step()
    with recipes[1].watch() as metrics:
        there(tokens(320, device, torch.float32))
    assert 0.3 < metrics["mlps.1"].density < 0.7


def test_compiled_training_recipe(net: nn.Module, device: torch.device) -> None:
    """torch.compile(fullgraph, dynamic) of a training step: one graph for five token counts and both phases."""
    net = net.float().train()
    eager = copy.deepcopy(net)
    recipes = [srelu24.Recipe(warmup_steps=2, refresh=1) for _ in range(2)]
    for model, recipe in zip((net, eager), recipes, strict=True):
        srelu24.convert(model, recipe=recipe)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for m in TOKENS:
        x = tokens(m, device, torch.float32)
        net.zero_grad()
        (compiled(x).square().mean() * 100).backward()
        expected = gradients(eager, x)
        assert all(distance(p.grad, g) < 0.02 for p, g in zip(net.parameters(), expected, strict=True))
        assert recipes[0].step() == recipes[1].step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("on_kernels", [False, True], ids=["reference", "kernels"])
def test_opcheck_training(on_kernels: bool, device: torch.device) -> None:
    """torch.library.opcheck of the training ops, on the reference and on the kernels."""
    m, ops = 128, torch.ops.srelu24
    x, w1 = tokens(m, device)[0], torch.randn(F, D, device=device).bfloat16()
    w2, g = (torch.randn(D, F, device=device) / 30).bfloat16(), torch.randn(m, D, device=device).bfloat16()
    flag, features = torch.tensor(True), torch.arange(64, device=device)
    torch.library.opcheck(ops.ffn_train.default, (x, w1, w2, None, None, flag, features, None, on_kernels, None, None))
    torch.library.opcheck(ops.ffn_recipe.default, (x, w1, w2, None, None, flag, features, None, on_kernels))
    _, hidden, _ = ops.ffn_train(x, w1, w2, None, None, flag, features, None, on_kernels, None, None)
    saved = (g, x, w1, w2, hidden, flag, features, None)
    torch.library.opcheck(ops.ffn_train_backward.default, (*saved, [True] * 5))
    buffers = torch.zeros(F, D, device=device), torch.zeros(D, F, device=device)
    torch.library.opcheck(ops.ffn_train_into.default, (*saved, [True] * 5, *buffers))
    torch.library.opcheck(ops.hidden_kept.default, (hidden, x, F, flag, features, None))
