"""The reference step against finite differences with fixed masks, torch's own autograd, and masks counted by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from srelu24.numerics import reference as numerics
from srelu24.training import reference
from srelu24.training.order import token_order
from srelu24.training.reference import Needed, Pruning

M, D, F = 37, 6, 16
DENSE = torch.tensor([2, 3, 11])
STRIDES = (None, 0, 1, 2)

strides = pytest.mark.parametrize("stride", STRIDES)


class Layer:
    """A small float64 layer, at about 50 % density, and a gradient of its output."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(seed)
        shapes = ((M, D), (F, D), (D, F), (F,), (D,), (M, D))
        tensors = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
        self.x, self.w1, self.w2, self.b1, self.b2, self.g = tensors

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.x, self.w1, self.w2, self.b1, self.b2

    def run(self, pruning: Pruning | None) -> tuple[reference.Forward, reference.Gradients]:
        accumulate = torch.float64
        step = reference.forward(*self.operands, pruning=pruning, accumulate=accumulate)
        saved = (self.g, self.x, self.w1, self.w2, step.hidden)
        return step, reference.backward(*saved, pruning=pruning, accumulate=accumulate)


def two_largest(values: list[float]) -> list[bool]:
    """NaN before Inf before what is finite, lower index first: by sorting, which the code under test does not."""
    ranks = sorted(range(4), key=lambda i: (not math.isnan(values[i]), -abs(values[i]), i))
    return [i in ranks[:2] for i in range(4)]


def mask_along_tokens(x: Tensor, stride: int | None, dense: Tensor) -> Tensor:
    """The mask, one group after another."""
    m, f = x.shape
    order = token_order(m, stride, x.device).tolist()
    mask = torch.zeros(m, f, dtype=torch.bool)
    for feature in range(f):
        for start in range(0, len(order), 4):
            group = order[start : start + 4]
            values = [x[t, feature].item() if t < m else 0.0 for t in group]
            for t, kept in zip(group, two_largest(values), strict=True):
                if t < m:
                    mask[t, feature] = kept
    mask[:, dense] = True
    return mask


def difference(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a scalar by central differences."""
    gradient, step = torch.empty_like(at), 1e-5
    for i in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[i] = step
        shift = shift.view_as(at)
        gradient.view(-1)[i] = (loss(at + shift) - loss(at - shift)) / (2 * step)
    return gradient


def close(a: Tensor | None, b: Tensor) -> None:
    assert a is not None
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ gradients


@strides
def test_gradients_are_finite_differences_with_fixed_masks(stride: int | None) -> None:
    o, pruning = Layer(), Pruning(DENSE, stride)
    step, d = o.run(pruning)
    y1 = linear(o.x, o.w1, o.b1)
    kept = reference.kept_along_features(y1.relu())

    def loss(y1: Tensor) -> Tensor:
        return (o.g * linear(torch.where(kept, y1.relu().square(), 0.0), o.w2, o.b2)).sum()

    close(d.x, difference(lambda x: loss(linear(x, o.w1, o.b1)), o.x))
    close(d.b1, difference(lambda b: loss(linear(o.x, o.w1, b)), o.b1))
    close(d.b2, difference(lambda b: (o.g * linear(step.hidden, o.w2, b)).sum(), o.b2))
    # Weight gradients see only what pruning along tokens kept: of S, and of the way that W1 moves Y1.
    kept_s = mask_along_tokens(step.hidden, stride, DENSE)
    close(d.w2, difference(lambda w: (o.g * linear(step.hidden * kept_s, w, o.b2)).sum(), o.w2))
    dy1 = 2 * (o.g @ o.w2) * y1.relu() * kept
    kept_dy1 = mask_along_tokens(dy1, stride, DENSE)
    close(d.w1, difference(lambda w: loss(y1 + kept_dy1 * (linear(o.x, w, o.b1) - y1)), o.w1))


@strides
def test_gradients_are_those_of_autograd_through_the_masked_graph(stride: int | None) -> None:
    o, pruning = Layer(1), Pruning(DENSE, stride)
    step, d = o.run(pruning)
    leaves = [t.clone().requires_grad_() for t in o.operands]
    x, w1, w2, b1, b2 = leaves
    to_weight = x.detach() @ w1.T  # the way on which only W1 is reached
    to_weight.register_hook(lambda g: g * mask_along_tokens(g, stride, DENSE))
    y1 = to_weight + x @ w1.detach().T - to_weight.detach() + b1
    s = torch.where(reference.kept_along_features(y1.relu()), y1.relu().square(), 0.0)
    kept = mask_along_tokens(s, stride, DENSE)
    pruned = (s.detach() * kept) @ w2.T
    y = pruned + s @ w2.detach().T - pruned.detach() + b2
    torch.testing.assert_close(step.y, y.detach())
    y.backward(o.g)
    for ours, leaf in zip((d.x, d.w1, d.w2, d.b1, d.b2), leaves, strict=True):
        assert leaf.grad is not None
        close(ours, leaf.grad)


def test_the_dense_step_is_the_dense_network() -> None:
    o = Layer(2)
    step, d = o.run(None)
    leaves = [t.clone().requires_grad_() for t in o.operands]
    x, w1, w2, b1, b2 = leaves
    y = linear(linear(x, w1, b1).relu().square(), w2, b2)
    torch.testing.assert_close(step.y, y.detach())
    y.backward(o.g)
    for ours, leaf in zip((d.x, d.w1, d.w2, d.b1, d.b2), leaves, strict=True):
        assert leaf.grad is not None
        close(ours, leaf.grad)


def test_masks_that_are_not_reused_prune_each_operand_on_its_own() -> None:
    o = Layer(3)
    pruning = Pruning(DENSE, 1, reuse_masks=False)
    step, d = o.run(pruning)
    r = linear(o.x, o.w1, o.b1).relu()
    torch.testing.assert_close(step.hidden, r.square())
    torch.testing.assert_close(step.y, o.run(Pruning(DENSE, 1))[0].y)
    dy1 = 2 * (o.g @ o.w2) * r
    close(d.w1, (dy1 * mask_along_tokens(dy1, 1, DENSE)).T @ o.x)
    close(d.w2, o.g.T @ (r.square() * mask_along_tokens(r.square(), 1, DENSE)))
    close(d.x, torch.where(reference.kept_along_features(dy1), dy1, 0.0) @ o.w1)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5)))
def test_only_what_is_needed_is_computed(needed: tuple[bool, ...]) -> None:
    o, pruning = Layer(), Pruning(DENSE)
    step, everything = o.run(pruning)
    saved = (o.g, o.x, o.w1, o.w2, step.hidden)
    some = reference.backward(*saved, pruning=pruning, needed=Needed(*needed), accumulate=torch.float64)
    for name, wanted in zip(("x", "w1", "w2", "b1", "b2"), needed, strict=True):
        gradient = getattr(some, name)
        assert (gradient is not None) == wanted
        assert gradient is None or torch.equal(gradient, getattr(everything, name))


# ---------------------------------------------------------------------------------------------------------------- masks


@strides
def test_masks_along_tokens_are_counted_by_hand(stride: int | None) -> None:
    values = torch.randint(-3, 4, (M, F), generator=torch.Generator().manual_seed(5)).double()  # with many ties
    values[3:20, 1:4] = math.nan
    values[10:30, 2:6] = -math.inf
    mask = reference.kept_along_tokens(values, Pruning(DENSE, stride))
    assert torch.equal(mask, mask_along_tokens(values, stride, DENSE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forward_is_the_numerics_contract(dtype: torch.dtype) -> None:
    o = Layer(4, dtype)
    step = reference.forward(*o.operands, pruning=Pruning(DENSE))
    packed = numerics.gemm_relu2_24(o.x, o.w1, o.b1)
    assert torch.equal(step.hidden, packed.to_dense())
    assert torch.equal(step.y, numerics.ffn(*o.operands))
    assert torch.equal(step.counts, numerics.count_nonzeros(o.x, o.w1, o.b1))
    dense = reference.forward(*o.operands, pruning=None)
    assert torch.equal(dense.hidden, numerics.gemm(o.x, o.w1, o.b1, activation=numerics.Activation.RELU2))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_is_zero_where_s_is_whatever_comes_down(bad: float) -> None:
    o = Layer()
    o.g[5] = bad
    step, d = o.run(Pruning(DENSE))
    assert d.w1 is not None
    assert d.x is not None
    dead = torch.ones(F, dtype=torch.bool)
    dead[step.hidden[5].nonzero()] = False
    assert dead.any()
    assert d.w1[dead].isfinite().all()
    others = torch.arange(M) != 5
    assert d.x[others].isfinite().all()
    assert not d.x[5].isfinite().any()


def test_half_precision_gradients_are_close_to_float64() -> None:
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        o = Layer(6, dtype)
        exact = Layer(6, dtype)
        exact.x, exact.w1, exact.w2, exact.b1, exact.b2, exact.g = (t.double() for t in (*o.operands, o.g))
        everything = Pruning(torch.arange(F))  # so that a near tie cannot change what is kept along tokens
        step = reference.forward(*o.operands, pruning=everything)
        wide = step.hidden.double()
        saved = (o.x, o.w1, o.w2)
        for accumulate in (torch.float32, None):
            ours = reference.backward(o.g, *saved, step.hidden, pruning=everything, accumulate=accumulate)
            truth = reference.backward(
                exact.g, exact.x, exact.w1, exact.w2, wide, pruning=everything, accumulate=torch.float64
            )
            for name in ("x", "w1", "w2", "b1", "b2"):
                a, b = getattr(ours, name), getattr(truth, name)
                assert (a.double() - b).norm() < bound * b.norm(), name
