"""TMA descriptors: a CUtensorMap says where a box of a tensor lies and how it is swizzled into shared memory."""

from __future__ import annotations

import ctypes

from cuda.bindings import driver

from srelu24.numerics.dtypes import STORAGE_TYPES
from srelu24.runtime.loader import check, make_context_current
from srelu24_gen.spec import DType

_TMA_TYPE = {
    dtype: getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{row.tma}")
    for dtype, row in STORAGE_TYPES.items()
    if row.tma
}
_SWIZZLE = {
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}


def tensor_map(
    dtype: DType,
    address: int,
    *,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle_bytes: int,
) -> bytes:
    """A CUtensorMap's 128 bytes. Dims and strides in elements, innermost first (its stride is 1).

    Elements outside read as zero.

    Raises:
        LaunchError: the driver refused the description.
    """
    make_context_current()  # a thread's first call may take its output from torch's free list, and bind no context
    rank = len(dims)
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            _TMA_TYPE[dtype],
            rank,
            address,
            [driver.cuuint64_t(d) for d in dims],
            [driver.cuuint64_t(s * dtype.bytes) for s in strides],
            [driver.cuuint32_t(x) for x in box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLE[swizzle_bytes],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"describing a tensor of {dims} elements with row strides {strides} to the TMA",
    )
    return ctypes.string_at(int(encoded.getPtr()), 128)
