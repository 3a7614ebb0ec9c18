"""Is the output of an 8-bit GEMM right? docs/fp8.md, with bounds on what the tensor cores' short sums may differ by.

The bounds are wide next to those of 16-bit kernels (:mod:`srelu24.measuring.verify`), since NVIDIA does not document
how these sums are rounded; where all sums are exact, ``tests/gpu/test_fp8.py`` compares bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from srelu24.numerics.dtypes import row_of
from srelu24.numerics.sparse24 import Sparse24, unpack_metadata
from srelu24.runtime.launch import Operands
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import DType, Problem

SUM_BITS = 10
"""A sum may be off by 2^-10 of the product of its operands' norms, which bounds all partial sums (Cauchy-Schwarz)."""
_CHUNK_ROWS = 1024


class Wrong(Exception):
    """The first thing found wrong, in words."""


def largest_error(problem: Problem, operands: Operands) -> float:
    """Hold an output to the contract; the largest |output - reference| there is.

    Raises:
        Wrong: something is outside its bounds.
        Unsupported: the operands are not those of an 8-bit GEMM.
    """
    out, scales = operands.out, operands.scales
    if not problem.family.scaled or scales is None or scales.a is None or scales.b is None:
        raise Unsupported(f"{problem} is checked with the scales of an 8-bit GEMM; give operands that have them")
    error = 0.0
    for row0, y, noise in _sums(problem, operands):
        rows = slice(row0, row0 + y.shape[0])
        if isinstance(out, Sparse24):
            error = max(error, _check_packed(problem, operands, out, rows, y, noise))
        else:
            error = max(error, _compare("output", out[rows], y, noise, row0))
    if isinstance(out, Sparse24):
        _check_padding(out)
    return error


def _sums(problem: Problem, o: Operands) -> Iterator[tuple[int, Tensor, Tensor]]:
    """In chunks of rows: the first row, the scaled sums with bias and residual, and the bound on their noise."""
    assert o.b is not None
    assert o.scales is not None
    assert o.scales.a is not None
    assert o.scales.b is not None
    b, row_scale = o.b.float(), o.scales.a.expand(problem.m)
    b_norm = torch.linalg.vector_norm(b, dim=1) * o.scales.b
    whole = o.a.to_dense() if isinstance(o.a, Sparse24) else o.a
    for row0 in range(0, problem.m, _CHUNK_ROWS):
        rows = slice(row0, row0 + _CHUNK_ROWS)
        a, scale = whole[rows].float(), row_scale[rows, None]
        y = (a @ b.T) * o.scales.b * scale
        noise = torch.linalg.vector_norm(a, dim=1)[:, None] * scale * b_norm * 2.0**-SUM_BITS
        if o.bias is not None:
            y = y + o.bias
        if o.residual is not None:
            y = y + o.residual[rows].float()
        yield row0, y, noise


def _check_packed(problem: Problem, o: Operands, out: Sparse24, rows: slice, y: Tensor, noise: Tensor) -> float:
    nibbles = unpack_metadata(out.metadata, *out.shape, out.order)[rows]
    first, second = (nibbles & 3).long(), (nibbles >> 2).long()
    _require("metadata nibble", first < second, rows.start)
    kept = torch.stack((first, second), dim=-1)
    r, slack = y.clamp(min=0).unflatten(1, (-1, 4)), noise.unflatten(1, (-1, 4))
    is_kept = torch.zeros_like(r, dtype=torch.bool).scatter_(2, kept, True)
    # Nothing that was dropped is larger than what was kept, beyond noise and the rounding to bf16.
    low, high = (r - slack) * (1 - 2.0**-7), (r + slack) * (1 + 2.0**-7)
    dropped, least = low.masked_fill(is_kept, 0.0).amax(dim=-1), high.masked_fill(~is_kept, torch.inf).amin(dim=-1)
    _require("2:4 selection, column / 4", dropped <= least, rows.start)
    r, slack = (t.gather(2, kept).flatten(1) for t in (r, slack))
    if problem.family.out is DType.BF16:
        return _compare("kept r", out.values[rows], r, slack, rows.start)
    assert o.scales is not None
    assert o.scales.s_inverse is not None
    inverse = o.scales.s_inverse.expand(problem.m)[rows, None]
    s = (r * r * inverse).clamp(max=448)
    return _compare("kept value", out.values[rows], s, ((r + slack) ** 2 - r * r) * inverse, rows.start)


def _check_padding(out: Sparse24) -> None:
    """Groups beyond the matrix are zero groups."""
    blocks, across = out.metadata.shape[:2]
    m, f = out.shape
    everything = unpack_metadata(out.metadata, 64 * blocks, 256 * across, out.order) == 4
    everything[:m, : f // 4] = True
    _require("metadata padding", everything, 0)


def _compare(what: str, got: Tensor, wanted: Tensor, noise: Tensor, row0: int) -> float:
    row = row_of(got.dtype)
    assert row.step is not None
    bound = noise + (wanted.abs() + noise) * (row.step + 2.0**-7) + row.smallest
    error = (got.float() - wanted).abs()
    _require(what, error <= bound, row0)  # NaN is in no bound
    return float(error.max()) if error.numel() else 0.0


def _require(what: str, fine: Tensor, row0: int) -> None:
    bad = int((~fine).sum())
    if bad:
        row, column = (int(i) for i in (~fine).nonzero()[0])
        raise Wrong(f"{what}: {bad} wrong, the first at row {row0 + row}, column {column}")
