"""Inputs of the GEMMs of a training step to measure on: one layer's, whose activations have a chosen density."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import torch
from torch import Tensor

from srelu24.measuring.workload import make_ffn, poison, prune
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24.numerics.sparse24 import Sparse24
from srelu24.training.kernels import TrainingOperands
from srelu24.training.order import BLOCK, row_order
from srelu24.training.packed import TokenSparse24
from srelu24_gen.models import Shape
from srelu24_gen.space import trains
from srelu24_gen.spec import Activation, DType, Family, Op


class StepData:
    """The operands of every GEMM of a training step, on the same data: each tensor is made once, when first asked for.

    The layer is that of :func:`~srelu24.measuring.workload.make_ffn`, G = N(0,1)/sqrt(D), and the groups along tokens
    are the widest. What a kernel reads is made by PyTorch, never by another kernel. M is a multiple of 16, D and F are
    of 64.
    """

    def __init__(self, shape: Shape, dtype: DType, density: float, device: torch.device | str, seed: int = 0) -> None:
        self._shape, self._device = shape, torch.device(device)
        self._random = torch.Generator(device).manual_seed(seed + 1)
        self._ffn = make_ffn(*shape, dtype, density, device, seed)
        self._g = self._normal(shape.m, shape.d).div_(math.sqrt(shape.d)).to(TORCH_DTYPE[dtype])
        self._made: dict[Family, TrainingOperands] = {}

    @staticmethod
    def serves(family: Family) -> bool:
        """Whether such a kernel is one of the GEMMs of a step."""
        return trains(family) and family.op.multiplies

    def operands(self, family: Family) -> TrainingOperands:
        """For the kernel of a family that :meth:`serves` accepts; outputs are its own and not poisoned, those that it
        adds to are random."""
        if family not in self._made:
            self._made[family] = self._make(family)
        return self._made[family]

    def _make(self, family: Family) -> TrainingOperands:
        m, d, f = self._shape
        x, w1, w2, g, stride = self._ffn.x, self._ffn.w1, self._ffn.w2, self._g, None
        if family.op is Op.GEMM_RELU2_24:
            counts = torch.zeros(f, dtype=torch.int32, device=self._device) if family.count_nonzeros else None
            along = TokenSparse24.empty(m, f, x.dtype, self._device)
            out = Sparse24.empty(m, f, x.dtype, self._device)
            return TrainingOperands(
                a=x, b=w1, out=out, token_stride=stride, bias=self._bias(family, f), counts=counts, along_tokens=along
            )
        if family.op is Op.GEMM_DRELU2_24:
            s = self._s
            along = TokenSparse24.empty(m, f, x.dtype, self._device)
            out = dataclasses.replace(s, values=torch.empty_like(s.values))
            return TrainingOperands(a=g, b=w2.T.contiguous(), out=out, token_stride=stride, along_tokens=along, saved=s)
        if family.op is Op.SPGEMM:
            return TrainingOperands(
                a=self._s, b=w2, out=torch.empty_like(x), token_stride=stride, bias=self._bias(family, d)
            )
        a, b = (self._s_tokens, g) if family.transposed else (self._dy1_tokens, x)
        total = self._normal(*((d, f) if family.transposed else (f, d)))
        return TrainingOperands(a=a, b=b, out=total.to(TORCH_DTYPE[family.out or family.dtype]), token_stride=stride)

    def _bias(self, family: Family, n: int) -> Tensor | None:
        return self._normal(n).mul_(0.1).to(self._ffn.x.dtype) if family.bias else None

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self._device)

    @cached_property
    def _rows(self) -> Tensor:
        return row_order(self._shape.m, None, self._device)

    @cached_property
    def _s(self) -> Sparse24:
        """S, rows in the order of the groups along tokens."""
        return prune(torch.nn.functional.linear(self._ffn.x[self._rows], self._ffn.w1))

    @cached_property
    def _s_tokens(self) -> TokenSparse24:
        return _pruned_along_tokens(self._s.to_dense())

    @cached_property
    def _dy1_tokens(self) -> TokenSparse24:
        ds = self._g[self._rows] @ self._ffn.w2
        return _pruned_along_tokens(self._s.to_dense().sqrt_().mul_(2).mul_(ds))


def poison_outputs(o: TrainingOperands) -> None:
    """Fill what a kernel writes whole with poison (:func:`~srelu24.measuring.workload.poison`), clear what it counts
    into."""
    poison(o.out.values if isinstance(o.out, Sparse24) and o.saved is not None else o.out)
    if o.along_tokens is not None:
        poison(o.along_tokens.values)
        o.along_tokens.metadata.fill_(-1)
    if o.counts is not None:
        o.counts.zero_()


def by_position(dense: Tensor) -> Tensor:
    """Rows [M, F] in the order of the groups along tokens, by position: neighbours are a group."""
    m, f = dense.shape
    return dense.view(m // BLOCK, 2, BLOCK // 2, f).transpose(1, 2).reshape(m, f)


def _pruned_along_tokens(dense: Tensor) -> TokenSparse24:
    return TokenSparse24.of_transposed(prune(by_position(dense).T.contiguous(), Activation.NONE), len(dense))
