"""The operands of the 8-bit ops by name, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from srelu24.fp8.quantize import QuantizedRows


class FfnOperands(NamedTuple):
    """Of ``srelu24::ffn_fp8``.

    Attributes:
        x: [M, D], 16 bits.
        w1: [F, D], e4m3 or e5m2, with w1_scale, fp32 [F].
        w2: [D, F], e4m3 or e5m2, with w2_scale, fp32 [D].
        b1: [F]. b2: [D]. In the type of x.
        recipe: its name.
        basis: what the scale of S follows from besides the row itself, fp32: of a static recipe [2], the scale and its
            inverse; of the others [], the largest norm of a row of w1.
        saturated: int64 [], added to.
    """

    x: Tensor
    w1: Tensor
    w1_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    b1: Tensor | None
    b2: Tensor | None
    recipe: str
    basis: Tensor
    saturated: Tensor

    @property
    def rows1(self) -> QuantizedRows:
        """The first weight with its scales."""
        return QuantizedRows(self.w1, self.w1_scale)

    @property
    def rows2(self) -> QuantizedRows:
        """The second weight with its scales."""
        return QuantizedRows(self.w2, self.w2_scale)


class PlainOperands(NamedTuple):
    """Of ``srelu24::ffn_fp8_plain``, whose weights are not quantised yet.

    Attributes:
        x: [M, D], 16 bits. w1: [F, D]. w2: [D, F]. b1: [F]. b2: [D].
        recipe: its name.
        scales: of a static recipe, fp32 [2]: the scale of S and its inverse.
        saturated: int64 [], added to.
    """

    x: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    recipe: str
    scales: Tensor | None
    saturated: Tensor
