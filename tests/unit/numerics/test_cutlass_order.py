"""E in CUTLASS's order: to it and from it, in 16 and in 8 bits, against CuTe's own layout."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packed_data import COLUMNS, DTYPES, ROWS, assert_same_bits, random_fp8, random_nibbles, random_packed
from srelu24.numerics.sparse24 import Sparse24, pack_metadata, row_stride, unpack_metadata
from srelu24_gen.errors import Unsupported

_ATOM_16BIT = """
  using TensorEAtom_16bit = decltype(make_ordered_layout(Shape<Shape<_8,_2,_4>, Shape<_16,_2,NumK>>{},
                                                         Step <Step <_3,_1,_5>, Step < _0,_4,  _2>>{}));
"""


def cute_ordered_layout(text: str, num_k: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """``make_ordered_layout`` of an E atom: (shape, stride) of the M modes and of the K modes, fastest first."""
    numbers = [num_k if n == "NumK" else int(n) for n in re.findall(r"_(\d+)|(NumK)", text) for n in n if n]
    shape, step = numbers[:6], numbers[6:]
    assert sorted(step) == list(range(6))
    strides, running = [0] * 6, 1
    for mode in sorted(range(6), key=step.__getitem__):
        strides[mode], running = running, running * shape[mode]
    modes = list(zip(shape, strides, strict=True))
    return modes[:3], modes[3:]


def crd2idx(coordinate: int, modes: list[tuple[int, int]]) -> int:
    index = 0
    for size, stride in modes:
        index, coordinate = index + coordinate % size * stride, coordinate // size
    assert coordinate == 0
    return index


def cutlass_nibbles(e: Tensor, m: int, f: int, tile_k: int) -> Iterator[tuple[int, int, int]]:
    """Walk E as CuTe would: (row, group, nibble) by ``fill_layoutE``, 8 logical elements per byte."""
    atom_k = min(tile_k, 128)
    modes_m, modes_k = cute_ordered_layout(_ATOM_16BIT[_ATOM_16BIT.index("Shape") :], atom_k // 32)
    padded_m, padded_k = -(-m // 64) * 64, -(-f // atom_k) * atom_k
    memory = e.flatten().view(torch.uint8).tolist()
    assert len(memory) == padded_m * padded_k // 8
    for row in range(padded_m):
        for k in range(0, padded_k, 4):
            offset = crd2idx(row % 64, modes_m) + row // 64 * 64 * atom_k
            offset += crd2idx(k % atom_k, modes_k) + k // atom_k * padded_m * atom_k
            yield row, k // 4, memory[offset // 8] >> offset % 8 // 4 * 4 & 0xF


@pytest.mark.parametrize("tile_k", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(("m", "f"), [(1, 8), (63, 24), (65, 264), (128, 512)])
def test_to_cutlass_is_cutes_layout(m: int, f: int, tile_k: int) -> None:
    nibbles = random_nibbles(m, f).tolist()
    packed = random_packed(m, f)
    values, e = packed.to_cutlass(tile_k)
    for row, group, nibble in cutlass_nibbles(e, m, f, tile_k):
        assert nibble == (nibbles[row][group] if row < m and group < f // 4 else 4)
    assert values.shape == (m, row_stride(f))
    assert values.is_contiguous()
    assert_same_bits(values[:, : f // 2], packed.values)
    assert not values[:, f // 2 :].any()


def test_the_layout_above_is_the_installed_cutlass() -> None:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("nvidia-cutlass is not installed")
    header = "source/include/cutlass/gemm/collective/builders/sm90_sparse_config.inl"
    text = (Path(spec.origin).parent / header).read_text()
    assert "".join(_ATOM_16BIT.split()) in "".join(text.split())


@settings(max_examples=40)
@given(
    m=st.sampled_from(ROWS),
    f=st.sampled_from(COLUMNS),
    tile_k=st.sampled_from([32, 64, 96, 128, 192]),
    dtype=st.sampled_from(DTYPES),
)
def test_cutlass_round_trip(m: int, f: int, tile_k: int, dtype: torch.dtype) -> None:
    packed = random_packed(m, f, dtype)
    values, e = packed.to_cutlass(tile_k)
    back = Sparse24.from_cutlass(values, e.view(torch.uint8).flatten(), (m, f), tile_k)
    assert_same_bits(back.values, packed.values)
    assert torch.equal(back.metadata, packed.metadata)


def test_from_cutlass_ignores_its_padding() -> None:
    packed = random_packed(65, 24)
    values, e = packed.to_cutlass(64)
    values[:, 12:] = torch.nan
    everything = Sparse24.from_cutlass(torch.zeros(128, 32).bfloat16(), e, (128, 64), 64)
    nibbles = unpack_metadata(everything.metadata, 128, 64)
    nibbles[65:], nibbles[:, 6:] = 0xE, 0xE
    everything.metadata.copy_(pack_metadata(nibbles))
    back = Sparse24.from_cutlass(values, everything.to_cutlass(64)[1], (65, 24), 64)
    assert_same_bits(back.to_dense(), packed.to_dense())
    assert torch.equal(back.metadata, packed.metadata)


@pytest.mark.parametrize("tile_k", [-64, 0, 16, 48])
def test_cutlass_tile_k_must_be_a_multiple_of_32(tile_k: int) -> None:
    with pytest.raises(Unsupported, match="multiple of 32"):
        random_packed(1, 8).to_cutlass(tile_k)


def test_from_cutlass_refuses_wrong_sizes() -> None:
    values, e = random_packed(65, 264).to_cutlass(64)
    with pytest.raises(Unsupported, match="contiguous bytes"):
        Sparse24.from_cutlass(values, e, (65, 264), 128)
    with pytest.raises(Unsupported, match="contiguous bytes"):
        Sparse24.from_cutlass(values, e.view(torch.float32), (65, 264), 64)
    with pytest.raises(Unsupported, match="values"):
        Sparse24.from_cutlass(values[:, :100], e, (65, 264), 64)


@pytest.mark.parametrize(("m", "f"), [(1, 16), (65, 272)])
def test_cutlass_8_bit_order_byte_by_byte(m: int, f: int) -> None:
    """``TensorEAtom_8bit`` is row-major: 64 rows of 128 columns, a byte for each 8 of them."""
    nibbles = random_nibbles(m, f)
    e = random_fp8(m, f).to_cutlass(128)[1].view(torch.uint8).flatten()
    rows = -(-m // 64) * 64
    for row in range(m):
        for column in range(0, f, 8):
            byte = nibbles[row, column // 4] | nibbles[row, column // 4 + 1] << 4
            assert e[column // 128 * rows * 16 + row * 16 + column % 128 // 8] == byte
