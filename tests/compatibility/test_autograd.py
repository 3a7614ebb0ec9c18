"""Autograd, autocast, checkpointing and torch.func"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import srelu24
from srelu24.nn.modules import Linear24
from srelu24.numerics import reference
from srelu24_gen.errors import Unsupported

Distance = Callable[[Tensor, Tensor], float]


def gradients(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x) if run else model(x)
    y.float().square().mean().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def test_training_is_dense(net: nn.Module, x: Tensor) -> None:
    """Training a converted model is dense PyTorch, with one warning: gradients are those of the model before."""
    dense = gradients(net, x)
    srelu24.convert(net)
    with pytest.warns(srelu24.FallbackWarning, match="only ffn with a recipe trains sparsely"):
        ours = gradients(net, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


def test_training_of_linear24_is_dense(mlp: nn.Module, x: Tensor) -> None:
    """The same where only the second layer was converted."""
    dense = gradients(mlp, x)
    srelu24.convert(mlp)
    assert isinstance(mlp.c_proj, Linear24)
    assert all(torch.equal(a, b) for a, b in zip(gradients(mlp, x), dense, strict=True))


def test_evaluation_between_steps(net: nn.Module, x: Tensor) -> None:
    """Evaluation under no_grad and inference_mode prunes while parameters require gradients; training does not."""
    dense = net(x).detach()
    srelu24.convert(net)
    with torch.no_grad():
        pruned = net(x)
    with torch.inference_mode():
        assert torch.equal(net(x), pruned)
    assert torch.equal(net(x), dense)
    assert not torch.equal(pruned, dense)


def test_frozen_weights(net: nn.Module, x: Tensor) -> None:
    """A model whose parameters need no gradient prunes without no_grad, and passes gradients to its input dense."""
    net.requires_grad_(False)
    dense = net(x)
    srelu24.convert(net)
    assert not torch.equal(net(x), dense)
    leaf = x.clone().requires_grad_()
    assert torch.equal(net(leaf), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, x: Tensor) -> None:
    """Under autocast float32 parameters and inputs enter the kernels in autocast's type, without a warning."""
    ffn = srelu24.SquaredReLUFFN(32, 96, bias=True)
    x = x.float()
    with torch.no_grad(), torch.autocast("cpu", dtype), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ffn(x)
        told = srelu24.explain(x, ffn.up.weight, ffn.down.weight, ffn.up.bias, ffn.down.bias)
    assert told.runs == "reference"
    w1, b1, w2, b2 = (p.detach().to(dtype) for p in ffn.parameters())
    expected = reference.ffn(x.view(-1, 32).to(dtype), w1, w2, b1, b2).view(x.shape)
    assert torch.equal(y, expected)


def test_autocast_training(net: nn.Module, x: Tensor) -> None:
    """Training under autocast gives the dense model's gradients, in the parameters' own type."""
    net, x = net.float(), x.float()

    def run(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(y)

    dense = gradients(net, x, run)
    srelu24.convert(net)
    for ours, theirs in zip(gradients(net, x, run), dense, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=float(theirs.abs().max()) * 0.01)


def test_checkpoint(net: nn.Module, x: Tensor) -> None:
    """torch.utils.checkpoint(use_reentrant=False): outputs and gradients are those of the dense model."""
    dense = gradients(net, x)
    srelu24.convert(net)
    ours = gradients(net, x, lambda y: checkpoint(net, y, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


def test_reentrant_checkpoint(net: nn.Module, x: Tensor) -> None:
    """Reentrant checkpoints run their first pass under no_grad, so it is pruned; their gradients are dense."""
    srelu24.convert(net)
    with torch.no_grad():
        pruned = net(x)
    y = checkpoint(net, x.clone().requires_grad_(), use_reentrant=True)
    assert torch.equal(y, pruned)
    direction = torch.randn_like(y)
    y.backward(direction)
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).backward(direction)
    assert all(torch.equal(a, p.grad) for a, p in zip(ours, net.parameters(), strict=True))


def layer() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 32).bfloat16(), torch.randn(96, 32).bfloat16() / 6, torch.randn(32, 96).bfloat16() / 10


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return (x @ w1.T).relu().square() @ w2.T


def test_func_grad_and_vjp() -> None:
    """torch.func.grad and vjp are those of dense PyTorch."""
    x, w1, w2 = layer()
    ours = torch.func.grad(lambda w: srelu24.ffn(x, w, w2).float().sum())(w1)
    assert torch.equal(ours, torch.func.grad(lambda w: dense_ffn(x, w, w2).float().sum())(w1))
    _, pull = torch.func.vjp(lambda v: srelu24.ffn(v, w1, w2), x)
    _, pull_dense = torch.func.vjp(lambda v: dense_ffn(v, w1, w2), x)
    assert torch.equal(pull(x)[0], pull_dense(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_func_jvp() -> None:
    """Forward-mode derivatives (torch.func.jvp) are those of dense PyTorch, never silently zero."""
    x, w1, w2 = layer()
    _, ours = torch.func.jvp(lambda v: srelu24.ffn(v, w1, w2), (x,), (x,))
    _, dense = torch.func.jvp(lambda v: dense_ffn(v, w1, w2), (x,), (x,))
    assert torch.equal(ours, dense)
    assert ours.abs().sum() > 0


def test_func_vmap(distance: Distance) -> None:
    """torch.func.vmap over inputs, and over inputs and weights, gives what a loop gives."""
    x, w1, w2 = layer()
    with torch.no_grad():
        ours = torch.func.vmap(lambda v: srelu24.ffn(v, w1, w2))(x.view(2, 3, 32))
        assert torch.equal(ours.view(6, 32), srelu24.ffn(x, w1, w2))
        both = torch.func.vmap(lambda v, w: srelu24.ffn(v, w, w2))(x.view(2, 3, 32), torch.stack([w1, -w1]))
        assert torch.equal(both[1], srelu24.ffn(x[3:], -w1, w2))


def test_functional_call(mlp: nn.Module, x: Tensor) -> None:
    """torch.func.functional_call uses the parameters it is given."""
    model = nn.Sequential(mlp)
    srelu24.convert(model)
    other = {name: -p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(model, other, (x,))
        assert torch.equal(y, srelu24.ffn(x, other["0.c_fc.weight"], other["0.c_proj.weight"]))


@pytest.mark.parametrize(
    "call",
    [
        lambda h, s, w: srelu24.gemm_relu2_24(h, w),
        lambda h, s, w: srelu24.gemm_relu2_24_count(h, w),
        lambda h, s, w: srelu24.sparsify24(h),
        lambda h, s, w: srelu24.matmul(s, w),
    ],
    ids=["gemm_relu2_24", "gemm_relu2_24_count", "sparsify24", "matmul"],
)
def test_packed_ops_refuse_gradients(call: Callable[..., object]) -> None:
    """Ops on packed operands have no dense form: where a gradient is recorded they refuse, in one sentence."""
    h, w = torch.randn(6, 32).bfloat16(), torch.randn(96, 32).bfloat16()
    s = srelu24.sparsify24(h)
    with pytest.raises(Unsupported, match="only ffn with a recipe trains sparsely"):
        call(h.requires_grad_(), s, w.requires_grad_())
    with torch.no_grad():
        call(h, s, w)
    with pytest.raises(Unsupported, match="only ffn with a recipe trains sparsely"):
        torch.func.jvp(lambda v: call(v, s, v if v.shape == w.shape else w), (w.detach(),), (w.detach(),))


def test_linear_gradients_are_dense() -> None:
    """srelu24.linear and linear24 give dense PyTorch's gradients."""
    x, w1, w2 = layer()
    for function, weight, dense in (
        (lambda w: srelu24.linear(x, w, activation="relu2"), w1, lambda w: (x @ w.T).relu().square()),
        (lambda w: srelu24.linear24((x @ w1.T).relu(), w), w2, lambda w: (x @ w1.T).relu() @ w.T),
    ):
        ours = torch.func.grad(lambda w, f=function: f(w).float().square().sum())(weight)
        assert torch.equal(ours, torch.func.grad(lambda w, f=dense: f(w).float().square().sum())(weight))
