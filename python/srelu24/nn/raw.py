"""FFNs whose two matrices are parameters of the module itself, in either orientation, with biases or without."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srelu24.nn.layers import linear_of
from srelu24.nn.twin import close


class FfnOperands(NamedTuple):
    """w1 [F, D], w2 [D, F], b1 [F], b2 [D]."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None


@dataclass(frozen=True)
class RawMatrices:
    """Which parameters of a module are the operands of its FFN.

    Attributes:
        names: of W1 and W2.
        transposed: whether each is held as its transpose: W1 as [D, F], W2 as [F, D].
        biases: names of b1 and b2, None where there is none.
    """

    names: tuple[str, str]
    transposed: tuple[bool, bool]
    biases: tuple[str | None, str | None]

    @staticmethod
    def candidates(module: nn.Module, first: str, second: str, d: int, f: int) -> Iterator[RawMatrices]:
        """Every way in which parameters of these names may be the operands, D and F given."""
        shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
        b1 = [None, *(name for name, shape in shapes.items() if shape == (f,))]
        b2 = [None, *(name for name, shape in shapes.items() if shape == (d,))]
        for turned in itertools.product((False, True), repeat=2):
            wanted = ((d, f) if turned[0] else (f, d), (f, d) if turned[1] else (d, f))
            if (shapes[first], shapes[second]) == wanted:
                for biases in itertools.product(b1, b2):
                    yield RawMatrices((first, second), (turned[0], turned[1]), (biases[0], biases[1]))

    @property
    def tensors(self) -> tuple[str | None, ...]:
        """Names of all operands."""
        return (*self.names, *self.biases)

    def operands(self, module: nn.Module, dtype: torch.dtype | None = None) -> FfnOperands:
        """Those of a module, in a type; a matrix that is held transposed as a contiguous copy."""
        w1, w2 = (
            weight.t().contiguous() if turned else weight
            for weight, turned in zip((getattr(module, name) for name in self.names), self.transposed, strict=True)
        )
        b1, b2 = (None if name is None else getattr(module, name) for name in self.biases)
        if dtype is None:
            return FfnOperands(w1, w2, b1, b2)
        return FfnOperands(w1.to(dtype), w2.to(dtype), *(None if b is None else b.to(dtype) for b in (b1, b2)))

    def layers(self, module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        """Both as ``nn.Linear`` of these very numbers, to be asked and not to be kept."""
        w1, w2, b1, b2 = self.operands(module)
        return linear_of(w1, b1), linear_of(w2, b2)

    def is_ffn(self, module: nn.Module, x: Tensor, y: object) -> bool:
        """Whether ``y`` is the FFN of ``x`` with these operands, computed here in float64."""
        w1, w2, b1, b2 = self.operands(module, torch.float64)
        h = torch.nn.functional.linear(x.double(), w1, b1)
        return close(y, torch.nn.functional.linear(torch.relu(h).square(), w2, b2))
