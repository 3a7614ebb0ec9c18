"""The sparse FFN as one prepared call: gemm_relu2_24, then spgemm on what it packed.

A call of a small shape takes the host longer than the GPU. So everything that depends on sizes and type alone is
computed when a :class:`Pair` is made. A call only allocates, looks up both parameter blocks by its addresses, and
launches twice.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from srelu24.numerics.sparse24 import metadata_shape, row_stride
from srelu24.runtime.arguments import Arguments
from srelu24.runtime.gemm import GemmLauncher
from srelu24.runtime.loader import ArgumentBlock, stream
from srelu24.runtime.workspace import workspace
from srelu24_gen.models import Shape

_CACHED_CALLS = 8192
"""How many calls' parameter blocks are kept, of all pairs; torch's allocator reuses addresses, so few are needed."""


class Pair:
    """Both kernels of an FFN of one shape, dtype and device, loaded.

    The first one writes S and the second one reads it. S is packed as :class:`srelu24.numerics.sparse24.Sparse24` says,
    but in one allocation, metadata first, and the padding of its rows is not cleared, since spgemm does not read it.
    """

    def __init__(
        self, first: GemmLauncher, second: GemmLauncher, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> None:
        m, d, f = shape
        self.first, self.second, self.shape = first, second, shape
        self._out_size, self._dtype, self._device = (m, d), dtype, device
        self.metadata_bytes = 4 * math.prod(metadata_shape(m, f))
        self._packed_bytes = self.metadata_bytes + m * row_stride(f) * dtype.itemsize
        sizes = (first.workspace_size(m, f, d), second.workspace_size(m, d, f))
        self._flags, self._floats = map(max, zip(*sizes, strict=True))

    def __call__(self, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
        """x [M, D], w1 [F, D], w2 [D, F], b1 [F], b2 [D] -> [M, D]. Trusted, as by :func:`srelu24.runtime.launch.run`.

        Raises:
            LaunchError: the driver refused a launch.
        """
        device = self._device
        packed = torch.empty(self._packed_bytes, dtype=torch.uint8, device=device)
        out = torch.empty(*self._out_size, dtype=self._dtype, device=device)
        space = workspace(self._flags, self._floats, device) if self._flags else None
        (first, first_grid), (second, second_grid) = _encode(
            self,
            x.data_ptr(),
            w1.data_ptr(),
            w2.data_ptr(),
            0 if b1 is None else b1.data_ptr(),
            0 if b2 is None else b2.data_ptr(),
            packed.data_ptr(),
            out.data_ptr(),
            0 if space is None else space.partials.data_ptr(),
            0 if space is None else space.flags.data_ptr(),
            x.stride(0),
            w1.stride(0),
            w2.stride(0),
        )
        current = stream(self.first.kernel.device)
        self.first.kernel.launch(first_grid, first.address, current)
        self.second.kernel.launch(second_grid, second.address, current)
        return out


@functools.lru_cache(maxsize=_CACHED_CALLS)
def _encode(
    pair: Pair,
    x: int,
    w1: int,
    w2: int,
    b1: int,
    b2: int,
    packed: int,
    out: int,
    partials: int,
    flags: int,
    x_stride: int,
    w1_stride: int,
    w2_stride: int,
) -> tuple[tuple[ArgumentBlock, int], tuple[ArgumentBlock, int]]:
    """The parameter block and the grid of both kernels for these addresses and row strides."""
    m, d, f = pair.shape
    values, values_stride = packed + pair.metadata_bytes, row_stride(f)
    first = Arguments(
        a=x,
        b=w1,
        out=values,
        metadata=0,
        out_metadata=packed,
        bias=b1,
        residual=0,
        counts=0,
        partials=partials,
        flags=flags,
        m=m,
        n=f,
        k=d,
        a_stride=x_stride if m > 1 else d,  # of a single row torch keeps any stride
        b_stride=w1_stride,
        out_stride=values_stride,
        residual_stride=0,
    )
    second = first._replace(
        a=values,
        b=w2,
        out=out,
        metadata=packed,
        out_metadata=0,
        bias=b2,
        n=d,
        k=f,
        a_stride=values_stride,
        b_stride=w2_stride,
        out_stride=d,
    )
    return pair.first.encode(first), pair.second.encode(second)
