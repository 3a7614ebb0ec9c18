"""srelu24.ffn with a recipe, as a user trains with it: on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import srelu24
from srelu24.training import reference
from srelu24.training.recipe import LayerState
from srelu24.training.reference import Pruning
from srelu24_gen.errors import Unsupported

M, D, F = 48, 16, 256

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
phases = pytest.mark.parametrize("warmup_steps", [0, 1000], ids=["sparse", "dense"])


class Layer(nn.Module):
    """One FFN and its part of a recipe."""

    def __init__(self, recipe: srelu24.Recipe | None = None, dtype: torch.dtype = torch.float32, d: int = D) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random).div_(shape[-1] ** 0.5).to(dtype))

        self.w1, self.w2, self.b1, self.b2 = parameter(F, d), parameter(d, F), parameter(F), parameter(d)
        self.x = torch.randn(M, d, generator=random).to(dtype)
        self.g = torch.randn(M, d, generator=random).to(dtype)
        recipe = recipe or srelu24.Recipe(warmup_steps=0)
        self.state: LayerState = recipe.layer("ffn", self.w1)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.w1, self.w2, self.b1, self.b2

    def forward(self, x: Tensor) -> Tensor:
        return srelu24.ffn(x, *self.weights, recipe=self.state)

    def gradients(self, x: Tensor | None = None, g: Tensor | None = None) -> list[Tensor]:
        x = (self.x if x is None else x).clone().requires_grad_()
        return list(torch.autograd.grad(self(x), (x, *self.weights), self.g if g is None else g))

    def expected(self, accumulate: torch.dtype) -> list[Tensor]:
        """The reference's gradients, in its own types."""
        sparse = self.state.recipe.sparse
        pruning = Pruning(self.state.dense_features, self.state.recipe.token_stride) if sparse else None
        operands = [self.x, *(w.detach() for w in self.weights)]
        step = reference.forward(*operands, pruning=pruning, accumulate=accumulate)
        d = reference.backward(self.g, *operands[:3], step.hidden, pruning=pruning, accumulate=accumulate)
        found = [gradient for gradient in (d.x, d.w1, d.w2, d.b1, d.b2) if gradient is not None]
        assert len(found) == 5
        return found


def dense(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return linear(linear(x, w1, b1).relu().square(), w2, b2)


# ---------------------------------------------------------------------------------------------------------- the answers


@dtypes
@phases
def test_gradients_are_the_references(dtype: torch.dtype, warmup_steps: int) -> None:
    o = Layer(srelu24.Recipe(warmup_steps), dtype)
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    for ours, expected in zip(o.gradients(), o.expected(accumulate), strict=True):
        assert ours.dtype is dtype
        assert torch.equal(ours, expected.to(dtype))


def test_the_warm_up_is_the_dense_network() -> None:
    o = Layer(srelu24.Recipe(), torch.float64)
    x = o.x.clone().requires_grad_()
    y = dense(x, *o.weights)
    torch.testing.assert_close(o(o.x), y)
    for ours, theirs in zip(o.gradients(), torch.autograd.grad(y, (x, *o.weights), o.g), strict=True):
        torch.testing.assert_close(ours, theirs)


@phases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inference_is_the_forward_of_training(dtype: torch.dtype, warmup_steps: int) -> None:
    o = Layer(srelu24.Recipe(warmup_steps), dtype)
    with torch.no_grad():
        y = o(o.x)
    assert torch.equal(y, o(o.x).detach())
    assert o.state.rows == M  # only what trains is counted


def test_the_sparse_forward_is_that_of_inference_without_a_recipe() -> None:
    o = Layer(dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(o(o.x), srelu24.ffn(o.x, *o.weights))


@pytest.mark.parametrize("shape", [(D,), (1, D), (2, 3, D), (0, D), (2, 0, D)])
def test_leading_dimensions_and_the_empty_batch(shape: tuple[int, ...]) -> None:
    o = Layer()
    x = o.x.flatten()[: torch.Size(shape).numel()].view(shape).clone().requires_grad_()
    y = o(x)
    assert y.shape == shape
    y.backward(torch.ones(shape))
    assert x.grad is not None
    assert x.grad.shape == shape
    for w in o.weights:
        assert w.grad is not None
        assert w.grad.shape == w.shape
        assert torch.isfinite(w.grad).all()
        if 0 in shape:
            assert not w.grad.any()


def test_gradients_of_any_layout() -> None:
    o = Layer()
    expected = o.gradients(g=o.g)
    for ours, plain in zip(o.gradients(g=o.g.T.contiguous().T), expected, strict=True):
        assert torch.equal(ours, plain)
    for ours, plain in zip(o.gradients(g=torch.ones(()).expand(M, D)), o.gradients(g=torch.ones(M, D)), strict=True):
        assert torch.equal(ours, plain)


def test_inputs_of_any_layout() -> None:
    o = Layer()
    for ours, plain in zip(o.gradients(x=o.x.T.contiguous().T), o.gradients(), strict=True):
        torch.testing.assert_close(ours, plain)


def test_counts_are_the_non_zeros_before_pruning() -> None:
    o = Layer(srelu24.Recipe(warmup_steps=1))
    expected = (linear(o.x, o.w1, o.b1) > 0).sum(dim=0)
    o(o.x)
    assert torch.equal(o.state.counts, expected)
    o.state.recipe.step()
    assert o.state.recipe.sparse
    assert o.state.dense_features.tolist() == sorted(
        torch.argsort(expected, descending=True, stable=True)[:64].tolist()
    )
    o(o.x)
    assert torch.equal(o.state.counts, expected)
    assert o.state.rows == M


# ------------------------------------------------------------------------------------------------- ways people train


@pytest.mark.parametrize("frozen", [("w1",), ("w2",), ("b1", "b2"), ("w1", "w2", "b1"), ("w1", "b1")])
def test_frozen_parameters_cost_no_products(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    o = Layer()
    expected = dict(zip(("x", "w1", "w2", "b1", "b2"), o.gradients(), strict=True))
    for name in frozen:
        getattr(o, name).requires_grad_(False)
    needed: list[Any] = []
    real = reference.backward

    def spy(*args: Any, **kwargs: Any) -> Any:
        needed.append(kwargs["needed"])
        return real(*args, **kwargs)

    monkeypatch.setattr(reference, "backward", spy)
    o(o.x).backward(o.g)  # x needs none either
    (wanted,) = needed
    assert not wanted.x
    for name in ("w1", "w2", "b1", "b2"):
        assert getattr(wanted, name) == (name not in frozen)
        grad = getattr(o, name).grad
        assert grad is None if name in frozen else torch.equal(grad, expected[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    o = Layer()
    expected = o.gradients()
    x = o.x.clone().requires_grad_()
    y: Tensor = checkpoint(o, x, use_reentrant=reentrant)
    y.backward(o.g)
    for ours, plain in zip((x, *o.weights), expected, strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, plain)


def test_gradients_accumulate_as_autograd_does() -> None:
    o = Layer(dtype=torch.float64)
    once = o.gradients()[1:]
    for _ in range(3):
        o(o.x).backward(o.g)
    for w, gradient in zip(o.weights, once, strict=True):
        assert w.grad is not None
        torch.testing.assert_close(w.grad, 3 * gradient)


def test_weight_gradients_accumulate_unrounded_into_buffers() -> None:
    o = Layer(dtype=torch.bfloat16)
    rounded = o.gradients()
    exact = o.expected(torch.float32)
    w1_grad, w2_grad = torch.ones(F, D), torch.full((D, F), 2.0)
    o.state.accumulate_into(w1_grad, w2_grad)
    x = o.x.clone().requires_grad_()
    first, second = o(x), o(x)  # both forward passes before a backward pass changes the buffers
    first.backward(o.g)
    second.backward(o.g)
    torch.testing.assert_close(w1_grad, 1 + exact[1] + exact[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(w2_grad, 2 + exact[2] + exact[2], rtol=0, atol=1e-5)
    assert o.w1.grad is None
    assert o.w2.grad is None
    assert o.b1.grad is not None
    assert torch.equal(o.b1.grad, rounded[3] * 2)
    assert x.grad is not None
    assert torch.equal(x.grad, rounded[0] * 2)
    o.state.accumulate_into(None, None)
    o(x).backward(o.g)
    assert o.w1.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    o = Layer()
    low = Layer(dtype=dtype)
    with torch.no_grad():
        for mine, theirs in zip((low.x, *low.weights), (o.x, *o.weights), strict=True):
            mine.copy_(theirs)
    x = o.x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = o(x)
    assert y.dtype is dtype
    y.backward(o.g.to(dtype))
    low.g = o.g.to(dtype)
    for ours, plain in zip((x, *o.weights), low.gradients(), strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype is torch.float32
        assert torch.equal(ours.grad, plain.float())


def test_loss_scaling_sees_what_overflows() -> None:
    o = Layer(dtype=torch.float16)
    gradients = o.gradients()
    assert all(gradient.isfinite().all() for gradient in gradients)
    scaled = o.gradients(g=o.g * 64)
    for one, other in zip(gradients[1:], scaled[1:], strict=True):
        torch.testing.assert_close(other.float() / 64, one.float(), rtol=0.02, atol=0.01)
    assert not all(gradient.isfinite().all() for gradient in o.gradients(g=o.g * 16384))


@pytest.mark.parametrize("buffers", [False, True])
def test_double_backward_is_refused(buffers: bool) -> None:
    o = Layer()
    if buffers:
        o.state.accumulate_into(torch.zeros(F, D), torch.zeros(D, F))
    x = o.x.clone().requires_grad_()

    def twice() -> None:
        (gradient,) = torch.autograd.grad(o(x).sum(), x, create_graph=True)
        gradient.sum().backward()

    with pytest.raises(Unsupported, match="no second derivative; leave create_graph off"):
        twice()


def test_a_step_between_forward_and_backward_is_refused() -> None:
    o = Layer(srelu24.Recipe(warmup_steps=1))
    y = o(o.x)
    o.state.recipe.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(o.g)


def test_the_state_must_be_that_of_the_layer() -> None:
    o = Layer()
    with pytest.raises(Unsupported, match="'ffn' of the recipe is for F = 256 on cpu, and w1 has F = 8"):
        srelu24.ffn(o.x, o.w1[:8], o.w2[:, :8], recipe=o.state)
    with pytest.raises(Unsupported, match="w2 has shape"):
        srelu24.ffn(o.x, o.w1, o.w1, recipe=o.state)


# ------------------------------------------------------------------------------------------------ what torch needs


def test_operators_pass_torch_s_own_check() -> None:
    o = Layer()
    flag, features = o.state.recipe.sparse_flag, o.state.dense_features
    x = o.x.clone().requires_grad_()
    o_ = torch.ops.srelu24
    torch.library.opcheck(o_.ffn_train.default, (x, *o.weights, flag, features, None, False, None, None))
    hidden = reference.forward(o.x, o.w1.detach(), o.w2.detach(), pruning=Pruning(features)).hidden
    saved = (o.g, o.x, o.w1.detach(), o.w2.detach(), hidden, flag, features, 1)
    for needed in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(o_.ffn_train_backward.default, (*saved, needed))
        buffers = torch.zeros(F, D), torch.zeros(D, F)
        torch.library.opcheck(o_.ffn_train_into.default, (*saved, needed, *buffers))
    plain = [w if w is None else w.detach() for w in o.weights]
    torch.library.opcheck(o_.ffn_recipe.default, (o.x, *plain, flag, features, 1, False))
    torch.library.opcheck(o_.hidden_kept.default, (hidden, o.x, F, flag, features, 1))


@pytest.mark.parametrize("buffers", [False, True])
def test_compiled_code_switches_to_sparse_without_compiling_again(buffers: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    o, eager = (Layer(srelu24.Recipe(warmup_steps=2, refresh=2)) for _ in range(2))
    if buffers:
        for layer in (o, eager):
            layer.state.accumulate_into(torch.zeros(F, D), torch.zeros(D, F))
    compiled = torch.compile(o, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    for _ in range(4):
        for layer, run in ((o, compiled), (eager, eager)):
            layer.zero_grad()
            run(layer.x).backward(layer.g)
        for ours, plain in zip(o.weights, eager.weights, strict=True):
            if plain.grad is None:
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, plain.grad)
        for ours, plain in zip(o.state.tensors, eager.state.tensors, strict=True):
            assert torch.equal(ours, plain)
        if o.state.w1_grad is not None and eager.state.w1_grad is not None:
            torch.testing.assert_close(o.state.w1_grad, eager.state.w1_grad)
        assert o.state.recipe.step() == eager.state.recipe.step()
    assert o.state.recipe.sparse
    assert len(graphs) == 2  # forward and backward, once


# --------------------------------------------------------------------------------------------------------- in models


def test_a_module_trains_by_a_recipe() -> None:
    recipe, plain = srelu24.Recipe(warmup_steps=0), Layer()
    module = srelu24.SquaredReLUFFN(D, F, bias=True)
    for mine, theirs in zip(module.parameters(), (plain.w1, plain.b1, plain.w2, plain.b2), strict=True):
        mine.data.copy_(theirs.data)
    module.set_recipe(recipe, "ffn")
    state = recipe.layers["ffn"]
    assert module.recipe is state
    module(plain.x).backward(plain.g)
    expected = plain.gradients()
    for mine, wanted in zip(module.parameters(), (expected[i] for i in (1, 3, 2, 4)), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, wanted)
    assert state.rows == M
    with pytest.raises(Unsupported, match="layer 'ffn' already"):
        module.set_recipe(recipe, "ffn")
    module.up.register_forward_hook(lambda *_: None)  # which observes
    module.set_recipe(recipe, "again")
    module.up_proj = torch.nn.Sequential(module.up)
    with pytest.raises(Unsupported, match="more than a plain"):
        module.set_recipe(recipe, "other")


@pytest.mark.parametrize("option", [{"mode": "dense"}, {"mode": "sparse"}, {"deterministic": "batch"}])
def test_a_training_recipe_decides_alone(option: dict[str, Any]) -> None:
    o = Layer()
    with pytest.raises(Unsupported, match="a recipe decides what runs"):
        srelu24.ffn(o.x, *o.weights, recipe=o.state, **option)
