"""The numerics contract of docs/numerics.md in plain PyTorch, on any device. Kernels are held to this.

Source of the method: arXiv 2503.16672, section 3. Shapes: X [M, D], W1 [F, D], W2 [D, F], S [M, F] packed along F,
biases [F] and [D]; all of one 16-bit storage type. Everywhere ``accumulate`` is the type in which products are
summed and biases added: float32 by contract, float64 for a closer look at what the exact sum would give. The sum is
rounded to float32 before anything else happens, so only its own error changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from srelu24.numerics.activations import rule_of, unchanged
from srelu24.numerics.dtypes import STORAGE_DTYPES, FragmentOrder, row_of
from srelu24.numerics.sparse24 import Sparse24, pack_metadata
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = Activation.NONE,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """``act(A B^T + bias + residual)`` in the storage type.

    Args:
        a: [M, K].
        b: [N, K], a Linear weight.
        bias: [N].
        residual: [M, N], added before the activation.
        activation: as :mod:`srelu24.numerics.activations` says.
        accumulate: see the module.

    Returns:
        [M, N] in the type of ``a``.

    Raises:
        Unsupported: dtypes, devices or shapes do not fit together, or the activation is unknown.
    """
    rule = rule_of(activation)
    return rule.store(_sum_products(a, b, bias, residual, accumulate), a.dtype)


def gemm_relu2_24(
    x: Tensor, w1: Tensor, bias: Tensor | None = None, *, accumulate: torch.dtype = torch.float32
) -> Sparse24:
    """:func:`gemm_24` with squared ReLU."""
    return gemm_24(x, w1, bias, accumulate=accumulate)


def gemm_24(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None = None,
    activation: str = Activation.RELU2,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Sparse24:
    """``prune24(act(X W1^T + bias))`` along F: x [M, D], w1 [F, D], bias [F] -> packed [M, F].

    Raises:
        Unsupported: dtypes, devices or shapes do not fit together, F is not a multiple of 8, or the activation is
            unknown.
    """
    rule = rule_of(activation)
    acc = _sum_products(x, w1, bias, None, accumulate)
    return prune24(rule.select(acc, x.dtype), finish=rule.finish)


def spgemm(
    s: Sparse24,
    w2: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """``S W2^T + bias + residual``: S [M, F] packed, w2 [D, F], bias [D], residual [M, D] -> [M, D].

    Raises:
        Unsupported: dtypes, devices or shapes do not fit together.
    """
    return _sum_products(s.to_dense(), w2, bias, residual, accumulate).to(s.dtype)


def sparsify24(h: Tensor, activation: Activation) -> Sparse24:
    """Dense [M, F] to packed 2:4 along F, no matrix product.

    RELU2 selects the 2 largest of relu(h) and squares them; NONE selects the 2 of largest magnitude and keeps their
    bits.

    Raises:
        Unsupported: not a 2-D tensor in a 16-bit type, F is not a multiple of 8, or the activation is unknown.
    """
    rule = rule_of(activation)
    _check_operand("h", h, (None, None), h)
    return prune24(rule.select(h, h.dtype), finish=rule.finish)


def ffn(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = Activation.RELU2,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """The whole forward, ``spgemm(gemm_24(x, w1, b1), w2, b2)``: x [M, D], w1 [F, D], w2 [D, F] -> [M, D].

    Raises:
        Unsupported: dtypes, devices or shapes do not fit together, or F is not a multiple of 8.
    """
    return spgemm(gemm_24(x, w1, b1, activation, accumulate=accumulate), w2, b2, accumulate=accumulate)


def count_nonzeros(
    x: Tensor,
    w1: Tensor,
    bias: Tensor | None = None,
    activation: str = Activation.RELU2,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """For every feature, in how many rows what pruning selects by is not zero, before pruning: int32 [F]. With
    (squared) ReLU that is the rounded relu(X W1^T + bias).

    A NaN counts as non-zero.

    Raises:
        Unsupported: dtypes, devices or shapes do not fit together.
    """
    acc = _sum_products(x, w1, bias, None, accumulate)
    return (rule_of(activation).select(acc, x.dtype) != 0).sum(dim=0, dtype=torch.int32)


def prune24(
    x: Tensor,
    *,
    finish: Callable[[Tensor], Tensor] = unchanged,
    order: FragmentOrder = FragmentOrder.BITS16,
) -> Sparse24:
    """Keep the 2 largest magnitudes of every 4 neighbours, lower index first on ties.

    Args:
        x: [M, F], a 16-bit type.
        finish: what becomes of the kept values before they are stored, element by element.
        order: in which E is stored.
    """
    row = row_of(x.dtype)
    assert row.infinity is not None
    m, f = x.shape
    packed = Sparse24.empty(m, f, x.dtype, x.device, order)
    # Magnitude bits order as the magnitudes do, and NaNs, clamped to one rank, come above infinity.
    magnitude = (x.view(row.bits) & 0x7FFF).clamp(max=row.infinity + 1)
    keep = _two_largest([magnitude[:, p::4] for p in range(4)])
    x0, x1, x2, x3 = (x[:, p::4] for p in range(4))
    v0 = torch.where(keep[0], x0, torch.where(keep[1], x1, x2))
    v1 = torch.where(keep[3], x3, torch.where(keep[2], x2, x1))
    packed.values[:, 0::2] = finish(v0)
    packed.values[:, 1::2] = finish(v1)
    first = torch.where(keep[0], 0, torch.where(keep[1], 1, 2)).to(torch.uint8)
    second = torch.where(keep[3], 3, torch.where(keep[2], 2, 1)).to(torch.uint8)
    packed.metadata.copy_(pack_metadata(first | second << 2, order))
    return packed


def _sum_products(a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A B^T + bias + residual, summed in ``dtype``, as float32 [M, N]."""
    _check_operand("operand A", a, (None, None), a)
    _check_operand("weight B", b, (None, a.shape[1]), a)
    with torch.autocast(a.device.type, enabled=False):  # it would round the product to 16 bits
        acc = a.to(dtype) @ b.to(dtype).T
    if bias is not None:
        _check_operand("bias", bias, (b.shape[0],), a)
        acc += bias.to(dtype)
    if residual is not None:
        _check_operand("residual", residual, (a.shape[0], b.shape[0]), a)
        acc += residual.to(dtype)
    return acc.to(torch.float32)


def _two_largest(keys: list[Tensor]) -> list[Tensor]:
    """For each of four positions, whether fewer than two others come before it (larger, or equal and lower index)."""
    keep = []
    for p, key in enumerate(keys):
        before = torch.zeros_like(key, dtype=torch.int8)
        for q, other in enumerate(keys):
            if q != p:
                before += other >= key if q < p else other > key
        keep.append(before < 2)
    return keep


def _check_operand(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Refuse a tensor that is not of this shape (None: any size) and of the storage type and device of ``like``."""
    if tensor.dtype not in STORAGE_DTYPES:
        raise Unsupported(f"{name} is {tensor.dtype}; {' or '.join(map(str, STORAGE_DTYPES))} is needed")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise Unsupported(
            f"{name} is {tensor.dtype} on {tensor.device}, the first operand {like.dtype} on {like.device}; "
            "give all operands one dtype and one device"
        )
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(n not in (None, size) for n, size in zip(shape, sizes, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise Unsupported(f"{name} has shape {list(sizes)}; [{wanted}] is needed")
