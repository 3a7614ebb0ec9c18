"""The kernels of a training step that only move bytes: transposed weights, and the columns of the dense features.

Operands are trusted, as in :mod:`srelu24.training.kernels`.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.dispatch import gpu_of
from srelu24.runtime.launch import row_stride
from srelu24.runtime.loader import ArgumentBlock, LoadedKernel, load, stream
from srelu24.training.kernels import row_steps
from srelu24.training.order import BLOCK
from srelu24.training.packed import TokenSparse24
from srelu24_gen.compile import build
from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op

_TILE = 64
_THREADS = {Op.TRANSPOSE: 256, Op.DENSE_COLUMNS: 128}


def transposed(w: Tensor) -> Tensor:
    """W^T [N, M] of a 16-bit W [M, N], sizes multiples of 8: what ``w.T.contiguous()`` is, at the speed of a copy."""
    m, n = w.shape
    out = torch.empty(n, m, dtype=w.dtype, device=w.device)
    grid = -(-m // _TILE) * -(-n // _TILE)
    content = struct.pack("<2Q2q2i", w.data_ptr(), out.data_ptr(), row_stride(w), row_stride(out), m, n)
    _launch(Op.TRANSPOSE, w, grid, content)
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
    _split(s, columns, token_stride, along_tokens, out)
    return out


def clear_columns(along_tokens: TokenSparse24, columns: Tensor) -> None:
    """Set columns, int64 [n], to zero."""
    _split(None, columns, None, along_tokens, None)


def _split(
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
    content = struct.pack(
        "<5Q2q5i",
        0 if s is None else s.values.data_ptr(),
        0 if s is None else s.metadata.data_ptr(),
        columns.data_ptr(),
        0 if out is None else out.data_ptr(),
        0 if along_tokens is None else along_tokens.values.data_ptr(),
        0 if s is None else s.values.stride(0),
        f,
        m,
        f,
        count,
        *row_steps(m, token_stride),
    )
    grid = m // BLOCK * -(-count // _THREADS[Op.DENSE_COLUMNS])
    _launch(Op.DENSE_COLUMNS, packed.values, grid, content)


def _launch(op: Op, like: Tensor, grid: int, content: bytes) -> None:
    kernel, block = _kernel(op, like.device), ArgumentBlock(content)
    kernel.launch(grid, block.address, stream(kernel.device))


@functools.cache
def _kernel(op: Op, device: torch.device) -> LoadedKernel:
    """One moves bf16 and fp16 alike."""
    spec = KernelSpec(Family(op, DType.BF16), KernelConfig(), gpu_of(device).arch)
    if torch.cuda.is_current_stream_capturing():
        raise LaunchError(f"{spec.name} is not loaded yet; run a training step once before capturing a CUDA graph.")
    return load(build(spec), device.index, threads=_THREADS[op], shared_bytes=0)
