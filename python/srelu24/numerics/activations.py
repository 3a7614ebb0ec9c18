"""The activations: one row for each, with what it means to the reference, to verification and to the fallbacks.

A new activation is a row here, besides its name in :mod:`srelu24_gen.spec` and its code in the kernels' epilogues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRule:
    """One row of the table. ``finish(select(y, dtype))`` is the activation by the contract, docs/numerics.md.

    Attributes:
        select: from a sum, float32 or wider and of any shape, to the value in the storage type that pruning selects by
            magnitude. It never decreases, as :mod:`srelu24.measuring.verify` needs it for its intervals.
        finish: from what was selected to what is stored, in the same type, with one rounding. Of values that ``select``
            gives it never decreases either.
        plain: the activation in the type of its input, any float type, differentiable by autograd: what runs where no
            kernel does.
        nonnegative: no output is below zero.
        gradient: from dL/da and the stored a = act(y), in one type of any width, to dL/dy; it may overwrite dL/da. None
            where y does not follow from a.
    """

    select: Callable[[Tensor, torch.dtype], Tensor]
    finish: Callable[[Tensor], Tensor]
    plain: Callable[[Tensor], Tensor]
    nonnegative: bool
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None

    def store(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The activation of sums, rounded to ``dtype`` as the contract says."""
        return self.finish(self.select(y, dtype))


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y rounded to ``dtype``."""
    return y.to(dtype)


def rounded_relu(y: Tensor, dtype: torch.dtype) -> Tensor:
    """relu(y) rounded to ``dtype``; negative values and -0.0 become +0.0, NaN stays NaN."""
    return y.masked_fill(y <= 0, 0.0).to(dtype)


def square(v: Tensor) -> Tensor:
    """v * v with one rounding. The product of two 8- or 11-bit significands is exact in float32, or so small that its
    rounding there cannot change what it rounds to in v's type."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    return (wide * wide).to(v.dtype)


def unchanged(v: Tensor) -> Tensor:
    """v itself."""
    return v


def squared_relu(h: Tensor) -> Tensor:
    """relu(h)^2 in the type of h, differentiable."""
    return h.relu().square()


def squared_relu_gradient(da: Tensor, a: Tensor) -> Tensor:
    """2 da sqrt(a), in place. Zero, not 0 * da, where a is zero: da may be Inf or NaN there."""
    return da.mul_(a.sqrt()).mul_(2).masked_fill_(a == 0, 0.0)


ACTIVATION_RULES: dict[str, ActivationRule] = {
    Activation.NONE: ActivationRule(
        select=rounded, finish=unchanged, plain=unchanged, nonnegative=False, gradient=lambda da, a: da
    ),
    Activation.RELU2: ActivationRule(
        select=rounded_relu,
        finish=square,
        plain=squared_relu,
        nonnegative=True,
        gradient=squared_relu_gradient,
    ),
    Activation.RELU: ActivationRule(
        select=rounded_relu,
        finish=unchanged,
        plain=torch.relu,
        nonnegative=True,
        gradient=lambda da, a: da.masked_fill_(a == 0, 0.0),
    ),
}
"""The table."""


def rule_of(activation: str) -> ActivationRule:
    """The row of an activation, a member of :class:`Activation` or its name.

    Raises:
        Unsupported: the table has no such row.
    """
    rule = ACTIVATION_RULES.get(activation) if isinstance(activation, str) else None
    if rule is None:
        raise Unsupported(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATION_RULES)}.")
    return rule
