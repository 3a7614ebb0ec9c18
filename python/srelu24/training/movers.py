"""The kernels of a training step that only move bytes: transposed weights, and the columns of the dense features.

Operands are trusted, as in :mod:`srelu24.training.kernels`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import address, row_stride
from srelu24.runtime.dispatch import gpu_of
from srelu24.runtime.launch import load_kernel
from srelu24.runtime.parameters import DENSE_COLUMNS_PARAMS, TRANSPOSE_PARAMS
from srelu24.runtime.rows import StructLauncher
from srelu24.training.kernels import row_steps
from srelu24.training.order import BLOCK
from srelu24.training.packed import TokenSparse24
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op

_TILE = 64
"""Rows and columns that a CTA of transpose moves."""


def transposed(w: Tensor) -> Tensor:
    """W^T [N, M] of a 16-bit W [M, N], sizes multiples of 8: what ``w.T.contiguous()`` is, at the speed of a copy."""
    m, n = w.shape
    out = torch.empty(n, m, dtype=w.dtype, device=w.device)
    launcher_for(Op.TRANSPOSE, w.device).launch(
        -(-m // _TILE) * -(-n // _TILE),
        in_=w.data_ptr(),
        out=out.data_ptr(),
        in_stride=row_stride(w),
        out_stride=row_stride(out),
        m=m,
        n=n,
    )
    return out


def dense_columns(
    s: Sparse24, columns: Tensor, token_stride: int | None, along_tokens: TokenSparse24 | None = None
) -> Tensor:
    """Columns of a packed matrix [M, F] whose rows are in the order of ``token_stride``, dense: [M, n] by tokens.

    Args:
        columns: int64 [n].
        along_tokens: set to zero in these columns on the way.
    """
    out = torch.empty(s.shape[0], len(columns), dtype=s.values.dtype, device=s.values.device)
    _split_columns(s, columns, token_stride, along_tokens, out)
    return out


def clear_columns(along_tokens: TokenSparse24, columns: Tensor) -> None:
    """Set columns, int64 [n], to zero."""
    _split_columns(None, columns, None, along_tokens, None)


def _split_columns(
    s: Sparse24 | None,
    columns: Tensor,
    token_stride: int | None,
    along_tokens: TokenSparse24 | None,
    out: Tensor | None,
) -> None:
    packed = s or along_tokens
    assert packed is not None
    (m, f), count = packed.shape, len(columns)
    if not m or not count:
        return
    row_step, block_step = row_steps(m, token_stride)
    launcher = launcher_for(Op.DENSE_COLUMNS, packed.values.device)
    launcher.launch(
        m // BLOCK * -(-count // launcher.kernel.threads),
        values=0 if s is None else s.values.data_ptr(),
        metadata=0 if s is None else s.metadata.data_ptr(),
        columns=columns.data_ptr(),
        out=address(out),
        token_values=0 if along_tokens is None else along_tokens.values.data_ptr(),
        stride=0 if s is None else s.values.stride(0),
        token_stride=f,
        m=m,
        n=f,
        count=count,
        row_step=row_step,
        block_step=block_step,
    )


LAYOUTS = {Op.TRANSPOSE: TRANSPOSE_PARAMS, Op.DENSE_COLUMNS: DENSE_COLUMNS_PARAMS}


@functools.cache
def launcher_for(op: Op, device: torch.device) -> StructLauncher:
    """The launcher of one of these two operations, with its kernel loaded. The same kernel moves every 16-bit type; it
    is named after bf16.

    Raises:
        CompileError, ToolchainError, LaunchError: as :func:`srelu24.runtime.launch.load_kernel`.
    """
    spec = KernelSpec(Family(op, DType.BF16), KernelConfig(), gpu_of(device).arch)
    return StructLauncher(load_kernel(spec, device.index), LAYOUTS[op])
