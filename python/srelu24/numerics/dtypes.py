"""The storage types: one row for each, with all that the Python side knows of it.

A new type is a row here, besides its names in :mod:`srelu24_gen.spec` and :mod:`srelu24_gen.bindings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from srelu24_gen.spec import WIDE_TYPES, DType


class FragmentOrder(StrEnum):
    """Which sparse tensor-core instructions read the metadata E of a packed matrix as it lies."""

    BITS16 = "16-bit"
    """wgmma.sp m64nNk32: bf16 and fp16 values."""
    BITS8 = "8-bit"
    """wgmma.sp m64nNk64: e4m3 and e5m2 values. 16-bit values may have it too, on their way to becoming 8-bit."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> FragmentOrder:
        """The order that the kernels consuming values of ``dtype`` read."""
        return cls.BITS8 if dtype in FP8_DTYPES else cls.BITS16

    @property
    def granule(self) -> int:
        """What F must be a multiple of: the columns whose kept values take 8 bytes."""
        return 16 if self is FragmentOrder.BITS8 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageType:
    """One row of the table.

    Attributes:
        torch_dtype: PyTorch's name of it.
        bits: an integer type of its width, to view values as bits.
        infinity: the bits of +Inf; None where the type has no Inf.
        order: in which order its kernels read E; None where no packed matrix has values of this type.
        largest: the largest finite value, to which a row of values with a scale is stretched; None without scales.
        tma: how the TMA moves it, by the name that follows ``CU_TENSOR_MAP_DATA_TYPE_``; None where the TMA does not.
        step: by how much of itself a value may move where noise moves it over a boundary of rounding, and
        smallest: by how much at least; what the check of 8-bit kernels allows. None where they store no such values.
        tolerance: the relative error (Frobenius norm) against float32 that a benchmark accepts of an FFN in this type:
            a few roundings, and far below what a wrong tile costs; None where no benchmark compares by it.
    """

    torch_dtype: torch.dtype
    bits: torch.dtype
    infinity: int | None = None
    order: FragmentOrder | None = None
    largest: float | None = None
    tma: str | None = None
    step: float | None = None
    smallest: float = 0.0
    tolerance: float | None = None


STORAGE_TYPES = {
    DType.BF16: StorageType(
        torch_dtype=torch.bfloat16,
        bits=torch.int16,
        infinity=0x7F80,
        order=FragmentOrder.BITS16,
        tma="BFLOAT16",
        step=2.0**-8,
        tolerance=1e-2,
    ),
    DType.FP16: StorageType(
        torch_dtype=torch.float16,
        bits=torch.int16,
        infinity=0x7C00,
        order=FragmentOrder.BITS16,
        tma="FLOAT16",
        step=2.0**-10,
        smallest=2.0**-24,
        tolerance=2e-3,
    ),
    DType.E4M3: StorageType(
        torch_dtype=torch.float8_e4m3fn,
        bits=torch.uint8,
        order=FragmentOrder.BITS8,
        largest=448.0,
        tma="UINT8",
        step=2.0**-3,
        smallest=2.0**-9,
    ),
    DType.E5M2: StorageType(
        torch_dtype=torch.float8_e5m2,
        bits=torch.uint8,
        infinity=0x7C,
        order=FragmentOrder.BITS8,
        largest=57344.0,
        tma="UINT8",
    ),
    DType.FP32: StorageType(torch_dtype=torch.float32, bits=torch.int32, infinity=0x7F800000),
}
"""The table."""

# Columns of the table that the rest of the package looks up.

TORCH_DTYPE = {dtype: row.torch_dtype for dtype, row in STORAGE_TYPES.items()}
DTYPES = {TORCH_DTYPE[dtype]: dtype for dtype in WIDE_TYPES}
"""The types of the 16-bit kernels, by torch's name."""
STORAGE_DTYPES = tuple(DTYPES)
"""What the 16-bit kernels store packed values as."""
FP8_DTYPES = tuple(row.torch_dtype for row in STORAGE_TYPES.values() if row.order is FragmentOrder.BITS8)
"""What the 8-bit kernels store packed values as."""
WIDE_NAMES = " and ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES)
"""The 16-bit types in words, for messages."""


def row_of(dtype: torch.dtype) -> StorageType:
    """The row of one of torch's types that the table has."""
    return _ROWS[dtype]


_ROWS = {row.torch_dtype: row for row in STORAGE_TYPES.values()}
