"""Inputs to measure on: FFNs whose hidden activations have a chosen density.

On a GPU that its power limit holds back, zeros run faster than noise, so timings only mean something on data like a
trained network's: about 10 % non-zeros before pruning after training, 50 % at initialisation (arXiv 2503.16672).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from srelu24.fp8 import quantize
from srelu24.fp8 import reference as fp8_reference
from srelu24.numerics import reference
from srelu24.numerics.activations import squared_relu
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.launch import Operands, Scales, allocate
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.space import trains
from srelu24_gen.spec import Activation, DType, Family, Op, Problem

_CHUNK_ROWS = 4096
"""Rows handled at once where float32 or index copies are needed; a multiple of the 64 rows of a metadata block."""


@dataclass(frozen=True, eq=False, slots=True)
class FFNData:
    """x [M, D], w1 [F, D], w2 [D, F], contiguous, of one storage type on one device."""

    x: Tensor
    w1: Tensor
    w2: Tensor


def make_ffn(
    m: int, d: int, f: int, dtype: DType, density: float, device: torch.device | str, seed: int = 0
) -> FFNData:
    """Random inputs of an FFN with a given density of its activations relu2(X W1^T).

    X = N(0,1) + 1, W1 = N(0,1)/sqrt(D) - s/D, W2 = N(0,1)/sqrt(F). A pre-activation is then normal with mean -s and
    variance 2 + s^2/D, half of which every feature keeps for all tokens: some features come out far denser than
    others, as in trained networks. s is solved from the density; 1.8 is about 10 %, 0 is 50 %.

    Args:
        density: expected share of non-zero activations. 0 gives none at all, 1 gives only non-zeros.

    Raises:
        Unsupported: the density is not within 0..1, or D is too small for it.
    """
    random = torch.Generator(device).manual_seed(seed)
    storage = TORCH_DTYPE[dtype]

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random, device=device)

    x, w1 = normal(m, d), normal(f, d).div_(math.sqrt(d))
    if density in (0.0, 1.0):
        # All factors of one sign leave nothing to chance.
        x.abs_()
        w1.abs_().mul_(1.0 if density else -1.0)
    else:
        w1.sub_(_shift(density, d) / d)
    w2 = normal(d, f).div_(math.sqrt(f))
    return FFNData(x.add_(1.0).to(storage), w1.to(storage), w2.to(storage))


def make_preactivations(m: int, f: int, dtype: DType, density: float, device: torch.device | str, seed: int) -> Tensor:
    """h [M, F], distributed like X W1^T of :func:`make_ffn` for a large D, without the GEMM."""
    random = torch.Generator(device).manual_seed(seed)
    h = torch.empty(m, f, dtype=TORCH_DTYPE[dtype], device=device)
    # The part that all tokens of a feature share, then each token's own.
    feature = torch.randn(f, generator=random, device=device)
    for rows in torch.split(h, _CHUNK_ROWS):
        values = torch.randn(rows.shape, generator=random, device=device)
        if density in (0.0, 1.0):
            values = values.abs_().add_(0.5).mul_(1.0 if density else -1.0)
        else:
            values += feature - _shift(density)
        rows.copy_(values)
    return h


def prune(h: Tensor, activation: Activation = Activation.RELU2) -> Sparse24:
    """:func:`srelu24.numerics.reference.sparsify24` in chunks of rows, so that its index tensors stay small."""
    m, f = h.shape
    packed = Sparse24.empty(m, f, h.dtype, h.device)
    for start in range(0, m, _CHUNK_ROWS):
        part = reference.sparsify24(h[start : start + _CHUNK_ROWS], activation)
        packed.values[start : start + _CHUNK_ROWS] = part.values
        packed.metadata[start // 64 : (start + _CHUNK_ROWS) // 64] = part.metadata
    return packed


def operands_for(problem: Problem, density: float, device: torch.device | str, seed: int = 0) -> Operands:
    """Inputs and outputs of one kernel, as an FFN of that density gives them.

    A of ``gemm`` is X where it has an activation (the first GEMM of an FFN), else relu2(X W1^T) (the second). A of
    ``sparsify24`` is X W1^T. Outputs are poisoned, so that what a kernel leaves out shows: NaN in values, -1 in
    metadata. Counts are 0, since kernels add to them.

    Raises:
        Unsupported: the density is not within 0..1, or K is too small for it.
    """
    if problem.family.scaled:
        return _scaled_operands(problem, density, device, seed)
    family, m, n, k = problem.family, problem.m, problem.n, problem.k
    storage = TORCH_DTYPE[family.dtype]
    random = torch.Generator(device).manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    a: Tensor | Sparse24
    b: Tensor | None = None
    if family.first:
        data = make_ffn(m, k, n, family.dtype, density, device, seed)
        a, b = data.x, data.w1
    elif family.op is Op.SPARSIFY24:
        a = make_preactivations(m, n, family.dtype, density, device, seed)
    else:
        h = make_preactivations(m, k, family.dtype, density, device, seed)
        a = prune(h) if family.op is Op.SPGEMM else squared_relu(h)
        b = normal(n, k).div_(math.sqrt(k)).to(storage)
    out = allocate(problem, torch.device(device))
    poison(out)
    return Operands(
        a=a,
        b=b,
        bias=normal(n).mul_(0.1).to(storage) if family.bias else None,
        residual=normal(m, n).to(storage) if family.residual else None,
        out=out,
        counts=torch.zeros(n, dtype=torch.int32, device=device) if family.count_nonzeros else None,
    )


def _scaled_operands(problem: Problem, density: float, device: torch.device | str, seed: int) -> Operands:
    """The same for an 8-bit GEMM: what the 16-bit operands are quantised to, and scales of S that fit the data."""
    family, m, n, k = problem.family, problem.m, problem.n, problem.k
    weight = quantize.E5M2 if family.weight is DType.E5M2 else quantize.E4M3
    wide = Family(family.op, DType.BF16, family.activation, family.bias, family.residual)
    o = operands_for(Problem(wide, m, n, k), density, device, seed)
    assert o.b is not None
    w = quantize.quantize_weight(o.b, weight)
    scales = Scales(b=w.scale, saturated=torch.zeros((), dtype=torch.int64, device=device))
    a: Tensor | Sparse24
    if isinstance(o.a, Sparse24):
        # Squares already: their roots are the r that an 8-bit GEMM1 would have left.
        r = fp8_reference.packed_roots(o.a)
        amax = fp8_reference.row_amax(r.values)
        a, _ = fp8_reference.square_to_e4m3(r, quantize.inverse_scale(amax))
        scales.a = quantize.scale(amax)
    else:
        rows = quantize.quantize_rows(o.a)
        a, scales.a = rows.values, rows.scale
        bound = fp8_reference.predicted_amax(o.a, w.row_norm, o.bias)
        scales.s_inverse, scales.r_largest = quantize.inverse_scale(bound), torch.zeros(m, device=device)
    out = allocate(problem, torch.device(device))
    poison(out)
    residual = o.residual if o.residual is None or family.out is None else o.residual.to(TORCH_DTYPE[family.out])
    bias = None if o.bias is None else o.bias.float()
    return Operands(a=a, b=w.values, bias=bias, residual=residual, out=out, scales=scales)


class SharedData:
    """The operands of every GEMM of one FFN, on the same data: each tensor is made once, when first asked for."""

    def __init__(self, shape: Shape, dtype: DType, density: float, device: torch.device | str, seed: int = 0) -> None:
        self._shape, self._dtype, self._device, self._seed = shape, dtype, torch.device(device), seed
        self._ffn = make_ffn(*shape, dtype, density, device, seed)
        self._outputs: dict[Family, Tensor | Sparse24] = {}

    @staticmethod
    def serves(family: Family) -> bool:
        """Whether such a kernel is one of the GEMMs of an FFN."""
        others = trains(family) or family.scaled or family.residual or family.count_nonzeros
        return family.op.multiplies and not others

    @cached_property
    def _hidden(self) -> tuple[Tensor, Sparse24]:
        """relu2(X W1^T), whole and pruned, [M, F]."""
        h = torch.nn.functional.linear(self._ffn.x, self._ffn.w1)
        return torch.relu(h).square_(), prune(h)

    @cached_property
    def _biases(self) -> tuple[Tensor, Tensor]:
        random = torch.Generator(self._device).manual_seed(self._seed + 1)
        sizes, storage = (self._shape.f, self._shape.d), TORCH_DTYPE[self._dtype]
        b1, b2 = (torch.randn(n, generator=random, device=self._device).mul_(0.1).to(storage) for n in sizes)
        return b1, b2

    def operands(self, family: Family) -> Operands:
        """For the kernel of a family that :meth:`serves` accepts; outputs are shared and not poisoned."""
        first = family.first
        activation = family.activation if first else Activation.RELU2
        problem = next(
            p
            for make in (self._shape.gemms, self._shape.dense_gemms)
            for p in make(self._dtype, activation=activation)
            if (p.family.op, p.family.activation) == (family.op, family.activation)
        )
        if family not in self._outputs:
            self._outputs[family] = allocate(dataclasses.replace(problem, family=family), self._device)
        return Operands(
            a=self._ffn.x if first else self._hidden[family.op is Op.SPGEMM],
            b=self._ffn.w1 if first else self._ffn.w2,
            bias=self._biases[0 if first else 1] if family.bias else None,
            out=self._outputs[family],
        )


def poison(out: Tensor | Sparse24) -> None:
    """Fills an output with what no kernel writes, in place: NaN in values, -1 in metadata."""
    if isinstance(out, Sparse24):
        poison(out.values)
        out.metadata.fill_(-1)
    elif out.itemsize == 1:
        out.view(torch.uint8).fill_(0x7F)  # NaN in e4m3 and in e5m2
    else:
        out.fill_(math.nan)


def _shift(density: float, d: int | None = None) -> float:
    """s such that a normal of mean -s and variance 2 + s^2/D is positive with this probability; D None is large."""
    if not 0.0 <= density <= 1.0:
        raise Unsupported(f"density is {density}; a share of non-zero activations from 0 to 1 is needed")
    z = NormalDist().inv_cdf(1.0 - density)
    shrink = 1.0 - z * z / d if d is not None else 1.0
    if shrink <= 0.0:
        raise Unsupported(f"density {density} cannot be reached with D = {d}; use a larger D, or density 0 or 1")
    return z * math.sqrt(2.0 / shrink)
