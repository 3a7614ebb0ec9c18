"""CUTLASS's sparse GEMM for Ampere, with the tiles that our mma.sync kernels have by default."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from tests.gpu.oracle import MMA_SYNC
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24, unpack_metadata
from srelu24_gen.spec import DType, Family, KernelConfig, KernelSpec, Op, Producer

CONFIGS = {
    "spgemm_sm80_128x256_s5": KernelConfig(128, 256, 64, cluster_m=1, stages=5, producer=Producer.ALL),
    "spgemm_sm80_256x128_s3": KernelConfig(256, 128, 64, cluster_m=1, stages=3, producer=Producer.ALL),
}
"""Functions of the library, and our configuration of the same tile, warps and depth: the defaults where a block has
227 and 99 KiB of shared memory."""
_TILE = 256
"""M and F are padded to it, which covers every tile of both."""


def our_spec(name: str) -> KernelSpec:
    """Our kernel to compare with a function of the library."""
    return KernelSpec(Family(Op.SPGEMM, DType.BF16), CONFIGS[name], "sm_90")


class CutlassSpgemmSm80:
    """``S B^T`` by CUTLASS's kernels for Ampere, in bf16."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(MMA_SYNC.build()))
        self._library.spgemm_status.restype = ctypes.c_char_p

    def prepared(self, name: str, s: Sparse24, b: Tensor) -> Callable[[], Tensor]:
        """S [M, F] packed and b [N, F], N a multiple of 8, in CUTLASS's order: a call multiplies them on torch's
        current stream, without synchronising, and returns [M, N].

        The call raises RuntimeError where CUTLASS refuses the operands or cannot launch.
        """
        (m, f), n = s.shape, b.shape[0]
        values = torch.nn.functional.pad(s.values, (0, -f % _TILE // 2, 0, -m % _TILE)).contiguous()
        e = reordered(unpack_metadata(s.metadata, m, f))
        b = torch.nn.functional.pad(b, (0, -f % _TILE)).contiguous()
        y = torch.full((values.shape[0], n), torch.nan, dtype=b.dtype, device=b.device)

        def run() -> Tensor:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, e, b, y)]
            stream = ctypes.c_void_p(torch.cuda.current_stream(y.device).cuda_stream)
            status = getattr(self._library, name)(*pointers, *y.shape, b.shape[1], stream)
            if status:
                raise RuntimeError(f"{name} {m}x{n}x{f}: {self._library.spgemm_status(status).decode()}")
            return y[:m]

        return run


def reordered(nibbles: Tensor) -> Tensor:
    """E for ``cutlass::gemm::device::SparseGemm`` on 16-bit values, int16 [F/32, M, 2], M and F padded.

    Source: ``reorder_meta`` in ``cutlass/util/host_reorder.h`` and ``layout::ColumnMajorInterleaved<2>``.

    Args:
        nibbles: uint8 [M, F/4], row-major.
    """
    m, groups = nibbles.shape
    nibbles = torch.nn.functional.pad(nibbles, (0, -groups % (_TILE // 4), 0, -m % _TILE), value=0x4)
    halves = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int16)  # [M, F/16]
    rows, columns = halves.shape
    # Of 32 rows 8 i + g the row 4 g + i; then of every 2 x 2 the upper right and the lower left change places.
    halves = halves.view(rows // 32, 4, 8, columns).transpose(1, 2).reshape(rows // 2, 2, columns // 2, 2)
    halves = halves.transpose(1, 3)
    # Columns in pairs, and within a pair of columns row by row.
    return halves.reshape(rows, columns // 2, 2).transpose(0, 1).contiguous()
