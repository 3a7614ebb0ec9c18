"""docs/fp8.md in plain PyTorch, on any device: each step of the 8-bit forward, bit for bit but for the order of sums.

Shapes: X [M, D], W1 [F, D], W2 [D, F]; the hidden S [M, F] packed along F, its metadata in the 8-bit order. Every
step takes the scales it needs as arguments, so that a kernel's step can be held to it with the kernel's own scales.
``accumulate`` is as in :mod:`srelu24.numerics.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srelu24.fp8.quantize import QuantizedRows, count_saturated, saturate
from srelu24.numerics import reference
from srelu24.numerics.activations import rounded_relu
from srelu24.numerics.dtypes import FragmentOrder
from srelu24.numerics.sparse24 import Sparse24, pack_metadata, unpack_metadata

BOUND_MARGIN = 1.07
"""What rounding may add to Cauchy-Schwarz: e4m3 up to 1/16 in X (the norm of W1 is of its rounded values), bf16 1/256
in r, fp32 a little in the norms."""


def gemm_relu2_24(
    x: QuantizedRows,
    w1: QuantizedRows,
    bias: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Sparse24:
    """The kept r of ``prune24(relu(X W1^T + bias))`` in bf16, not squared: x [M, D], w1 [F, D], bias [F] -> [M, F]."""
    y = _scaled_product(x.values, x.scale, w1, bias, None, accumulate)
    return reference.prune24(rounded_relu(y, torch.bfloat16), order=FragmentOrder.BITS8)


def row_amax(r: Tensor) -> Tensor:
    """fp32 [M]: the largest magnitude of each row of S, from the kept r [M, F/2]."""
    largest = r.float().amax(dim=1)
    return largest * largest


def predicted_amax(x: Tensor, row_norm: Tensor, bias: Tensor | None = None) -> Tensor:
    """fp32 [M]: a bound on each row of S, known before the GEMM, from the norms of X [M, D] and the largest of W1's.

    Cauchy-Schwarz: ``|x . w| <= |x| |w|``.
    """
    bound: Tensor = torch.linalg.vector_norm(x.float(), dim=1) * (row_norm * BOUND_MARGIN)
    if bias is not None:
        bound = bound + bias.float().abs().amax()
    return bound * bound


def square_to_e4m3(r: Sparse24, inverse: Tensor) -> tuple[Sparse24, Tensor]:
    """S in e4m3 from the kept r: ``r * r * inverse``, fp32 [M], or [] for all rows.

    Returns:
        S, and int64 []: how many of its values saturated.
    """
    wide = r.values.float()
    scaled = wide * wide * inverse.expand(r.shape[0])[:, None]
    s = Sparse24.empty(*r.shape, torch.float8_e4m3fn, r.device)
    s.values.copy_(saturate(scaled))
    s.metadata.copy_(r.metadata)
    return s, count_saturated(scaled)


def packed_roots(s: Sparse24) -> Sparse24:
    """The r whose squares a 16-bit S [M, F] holds, in bf16 and the 8-bit order."""
    m, f = s.shape
    r = Sparse24.empty(m, f, torch.bfloat16, s.device, FragmentOrder.BITS8)
    r.values.copy_(s.values.float().sqrt())
    r.metadata.copy_(pack_metadata(unpack_metadata(s.metadata, m, f, s.order), r.order))
    return r


def spgemm(
    s: Sparse24,
    s_scale: Tensor,
    w2: QuantizedRows,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """``S W2^T + bias + residual`` in ``dtype``: S [M, F] e4m3 of scale [M] or [], w2 [D, F], bias [D] -> [M, D]."""
    y = _scaled_product(s.to_dense(), s_scale.expand(s.shape[0]), w2, bias, residual, accumulate)
    return y.to(dtype)


def _scaled_product(
    a: Tensor,
    a_scale: Tensor,
    w: QuantizedRows,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """fp32 ``(A W^T) * w_scale * a_scale + bias + residual``, each operation rounded by itself, in this order."""
    y = (a.to(dtype) @ w.values.to(dtype).T).float() * w.scale * a_scale[:, None]
    if bias is not None:
        y += bias.float()
    if residual is not None:
        y += residual.float()
    return y
