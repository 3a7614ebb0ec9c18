"""Packed 2:4 matrices of random bits, for the tests of Sparse24."""

from __future__ import annotations

import torch
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24, pack_metadata

LEGAL_NIBBLES = [i0 | i1 << 2 for i1 in range(4) for i0 in range(i1)]


ROWS = [0, 1, 63, 64, 65, 130]
COLUMNS = [8, 24, 64, 256, 264, 1864]
DTYPES = [torch.bfloat16, torch.float16]


def random_nibbles(m: int, f: int, seed: int = 0) -> Tensor:
    picks = torch.randint(6, (m, f // 4), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8)[picks]


def random_packed(m: int, f: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Sparse24:
    """Any legal nibbles, any bits as values (NaN payloads and -0.0 among them)."""
    packed = Sparse24.empty(m, f, dtype, "cpu")
    bits = torch.randint(-(2**15), 2**15, (m, f // 2), generator=torch.Generator().manual_seed(seed))
    packed.values.copy_(bits.to(torch.int16).view(dtype))
    packed.metadata.copy_(pack_metadata(random_nibbles(m, f, seed)))
    return packed


def random_fp8(m: int, f: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Sparse24:
    packed = Sparse24.empty(m, f, dtype, "cpu")
    bits = torch.randint(256, (m, f // 2), generator=torch.Generator().manual_seed(m + f), dtype=torch.uint8)
    packed.values.copy_(bits.view(dtype))
    packed.metadata.copy_(pack_metadata(random_nibbles(m, f), packed.order))
    return packed


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Of 16-bit types."""
    assert a.dtype == b.dtype
    assert torch.equal(a.view(torch.int16), b.view(torch.int16))
