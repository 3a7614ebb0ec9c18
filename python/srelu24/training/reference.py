"""The training step of docs/training.md in plain PyTorch with explicit masks, on any device, in any float type.

Shapes: X [M, D], W1 [F, D], W2 [D, F], b1 [F], b2 [D], G = dL/dY [M, D]; all of one storage type. F is a multiple of 4.
``accumulate`` is the type in which products are summed; what follows a product works on that sum, and only what is
stored is rounded. None leaves the sum to a matmul in the storage type, which rounds its result: less exact than the
contract by that rounding, and as fast as dense PyTorch's products are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24.numerics.activations import rounded_relu, squared_relu_gradient
from srelu24.training.order import token_order


@dataclass(frozen=True, eq=False, slots=True)
class Pruning:
    """What the sparse step drops.

    Attributes:
        dense_features: int64 [n], features that are not pruned along tokens.
        token_stride: of the groups along tokens (:mod:`srelu24.training.order`).
        reuse_masks: prune along tokens, and prune dY1, on top of what the forward kept. False is not the method: it
            prunes each operand on its own, which the paper found to diverge, and is here to be compared with.
    """

    dense_features: Tensor
    token_stride: int | None = None
    reuse_masks: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class Forward:
    """What a forward pass gives.

    Attributes:
        y: [M, D].
        hidden: [M, F], what the backward needs: S, or all of relu2(Y1) where nothing is pruned or masks are not reused.
        counts: int32 [F], rows where relu(Y1) is not zero, before pruning.
    """

    y: Tensor
    hidden: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Needed:
    """Which gradients are wanted; products that only others need are left out."""

    x: bool = True
    w1: bool = True
    w2: bool = True
    b1: bool = True
    b2: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class Gradients:
    """The gradient of each operand, in its shape, in the type of the sums and not yet rounded to storage; None where it
    is not needed."""

    x: Tensor | None = None
    w1: Tensor | None = None
    w2: Tensor | None = None
    b1: Tensor | None = None
    b2: Tensor | None = None


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    pruning: Pruning | None,
    accumulate: torch.dtype | None = torch.float32,
) -> Forward:
    """The forward pass of one layer. Where ``pruning`` is None it is the dense step of the warm-up."""
    y1 = _apply_linear(x, w1, b1, accumulate)
    r = rounded_relu(y1, x.dtype)
    counts = (r != 0).sum(dim=0, dtype=torch.int32)
    hidden = r * r
    s = hidden
    if pruning is not None:
        s = torch.where(kept_along_features(r), hidden, 0.0)
        hidden = s if pruning.reuse_masks else hidden
    return Forward(_apply_linear(s, w2, b2, accumulate).to(x.dtype), hidden, counts)


def backward(
    g: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    *,
    pruning: Pruning | None,
    needed: Needed = Needed(),
    accumulate: torch.dtype | None = torch.float32,
) -> Gradients:
    """The gradients, from what :func:`forward` kept and with the pruning it was called with."""
    dy1 = dx = dw1 = dw2 = db1 = None
    if needed.x or needed.w1 or needed.b1:
        ds = _multiply(g, w2, accumulate).to(x.dtype)
        # Where ``accumulate`` is None this stays in the storage type, whatever that rounds: [M, F] in fp32 is large.
        wide = x.dtype if accumulate is None else torch.promote_types(x.dtype, torch.float32)
        dy1 = squared_relu_gradient(ds.to(wide), hidden.to(wide)).to(x.dtype)
    if dy1 is not None and needed.x:
        dx = _multiply(_prune_along_features(dy1, pruning), w1, accumulate)
    if dy1 is not None and needed.w1:
        dw1 = _multiply(_prune_along_tokens(dy1, pruning).T, x, accumulate)
    if dy1 is not None and needed.b1:
        db1 = _sum_columns(dy1, accumulate)
    if needed.w2:
        dw2 = _multiply(g.T, _prune_along_tokens(hidden, pruning), accumulate)
    return Gradients(dx, dw1, dw2, db1, _sum_columns(g, accumulate) if needed.b2 else None)


def kept_along_features(x: Tensor) -> Tensor:
    """Where the two largest magnitudes of every four neighbours in a row are: bool [M, F].

    NaN > Inf > finite, lower index first on ties (docs/numerics.md).
    """
    m, f = x.shape
    return _two_largest(x.reshape(m, f // 4, 4).unbind(dim=2), dim=2).view(m, f)


def kept_along_tokens(x: Tensor, pruning: Pruning) -> Tensor:
    """Where the two largest of every four tokens of a group are, and all of the dense features: bool [M, F]."""
    m, f = x.shape
    order = token_order(m, pruning.token_stride, x.device)
    grouped = torch.nn.functional.pad(x, (0, 0, 0, len(order) - m))[order].view(len(order) // 4, 4, f)
    kept = torch.empty(len(order), f, dtype=torch.bool, device=x.device)
    kept[order] = _two_largest(grouped.unbind(dim=1), dim=1).view(len(order), f)
    kept[:, pruning.dense_features] = True
    return kept[:m]


def _prune_along_features(dy1: Tensor, pruning: Pruning | None) -> Tensor:
    """dY1 for dX: the forward's mask has pruned it, unless masks are not reused."""
    if pruning is None or pruning.reuse_masks:
        return dy1
    return torch.where(kept_along_features(dy1), dy1, 0.0)


def _prune_along_tokens(x: Tensor, pruning: Pruning | None) -> Tensor:
    return x if pruning is None else torch.where(kept_along_tokens(x, pruning), x, 0.0)


def _two_largest(group: tuple[Tensor, ...], dim: int) -> Tensor:
    """For each of four values, whether fewer than two of the others come before it, stacked along ``dim``."""
    keys = [x.abs() for x in group]
    before = [torch.zeros_like(key, dtype=torch.int8) for key in keys]  # how many come before it
    for p in range(4):
        for q in range(p + 1, 4):
            p_first = keys[p].isnan() | (keys[p] >= keys[q])
            before[q] += p_first
            before[p] += ~p_first
    return torch.stack([count < 2 for count in before], dim=dim)


def _apply_linear(x: Tensor, w: Tensor, bias: Tensor | None, accumulate: torch.dtype | None) -> Tensor:
    if accumulate is not None:
        x, w, bias = x.to(accumulate), w.to(accumulate), None if bias is None else bias.to(accumulate)
    return torch.nn.functional.linear(x, w, bias)


def _multiply(a: Tensor, b: Tensor, accumulate: torch.dtype | None) -> Tensor:
    return a @ b if accumulate is None else a.to(accumulate) @ b.to(accumulate)


def _sum_columns(x: Tensor, accumulate: torch.dtype | None) -> Tensor:
    return x.sum(dim=0, dtype=accumulate or torch.promote_types(x.dtype, torch.float32))
