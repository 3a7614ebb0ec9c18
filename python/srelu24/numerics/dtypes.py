"""The kernels' types by torch's names."""

from __future__ import annotations

import torch

from srelu24_gen.spec import WIDE_TYPES, DType

TORCH_DTYPE = {
    DType.BF16: torch.bfloat16,
    DType.FP16: torch.float16,
    DType.E4M3: torch.float8_e4m3fn,
    DType.E5M2: torch.float8_e5m2,
    DType.FP32: torch.float32,
}
DTYPES = {TORCH_DTYPE[dtype]: dtype for dtype in WIDE_TYPES}
"""Storage types of the 16-bit kernels, by torch's name."""
