"""``Sparse24.to_cutlass`` against CUTLASS's own ``fill_layoutA`` and ``fill_layoutE``, run on the host."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests.gpu.oracle.sm80 import reordered
from torch import Tensor

from srelu24.numerics.sparse24 import Sparse24, pack_metadata
from srelu24_gen.target import Toolchain

SOURCE = Path(__file__).parent / "cutlass_layout.cpp"
LEGAL_NIBBLES = torch.tensor([i0 | i1 << 2 for i1 in range(4) for i0 in range(i1)], dtype=torch.uint8)
ZERO_GROUP = 4


@pytest.fixture(scope="session")
def cutlass_layout(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program. A C++ compiler is no dependency of the project, so there may be none."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to run CUTLASS's layout functions with")
    program = tmp_path_factory.mktemp("cutlass_layout") / "cutlass_layout"
    includes = [f"-I{folder}" for folder in toolchain.include_dirs]
    subprocess.run([compiler, "-std=c++17", "-O0", "-w", *includes, str(SOURCE), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("tile_k", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(("m", "f"), [(1, 8), (63, 24), (65, 264), (130, 1864), (1000, 512)])
def test_to_cutlass_is_what_cutlass_reads(cutlass_layout: Path, m: int, f: int, tile_k: int) -> None:
    check_layout(cutlass_layout, m, f, tile_k, torch.bfloat16, torch.int16)


@pytest.mark.parametrize("tile_k", [64, 128, 256])
@pytest.mark.parametrize(("m", "f"), [(1, 16), (63, 48), (65, 272), (130, 1872), (1000, 512)])
def test_to_cutlass_in_8_bits_is_what_cutlass_reads(cutlass_layout: Path, m: int, f: int, tile_k: int) -> None:
    check_layout(cutlass_layout, m, f, tile_k, torch.float8_e4m3fn, torch.uint8)


def test_the_order_of_the_oracle_for_ampere_is_what_cutlass_reorders() -> None:
    """Place by place, as ``reorder_meta`` and ``ColumnMajorInterleaved<2>`` say it for 16-bit halves."""
    m, f = 512, 256
    nibbles = LEGAL_NIBBLES[torch.randint(6, (m, f // 4), generator=torch.Generator().manual_seed(0))]
    halves = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int16)
    expected = torch.empty(m * f // 16, dtype=torch.int16)
    for m_, k in itertools.product(range(m), range(f // 16)):
        row, column = m_ // 32 * 32 + m_ % 8 * 4 + m_ % 32 // 8, k
        if row % 2 != column % 2:
            row, column = (row + 1, column - 1) if column % 2 else (row - 1, column + 1)
        expected[column // 2 * m * 2 + row * 2 + column % 2] = halves[m_, k]
    assert torch.equal(reordered(nibbles).flatten(), expected)


def check_layout(program: Path, m: int, f: int, tile_k: int, dtype: torch.dtype, bits_dtype: torch.dtype) -> None:
    """Every value and every nibble at the offset that CUTLASS computes, padding included, and nothing besides."""
    seed = torch.Generator().manual_seed(m + f)
    nibbles = LEGAL_NIBBLES[torch.randint(6, (m, f // 4), generator=seed)]
    bits = torch.randint(256**dtype.itemsize, (m, f // 2), generator=seed).to(bits_dtype)
    packed = Sparse24.empty(m, f, dtype, "cpu")
    packed.values.copy_(bits.view(dtype))
    packed.metadata.copy_(pack_metadata(nibbles, packed.order))
    values, e = packed.to_cutlass(tile_k)

    arguments = map(str, (m, f, tile_k, 8 * dtype.itemsize))
    printed = subprocess.run([program, *arguments], check=True, capture_output=True).stdout
    numbers = torch.frombuffer(bytearray(printed), dtype=torch.int64)
    (e_rows, e_columns, e_cosize), (a_rows, a_columns, a_cosize) = numbers[:3].tolist(), numbers[3:6].tolist()
    e_groups, a_groups = e_rows * e_columns // 4, a_rows * a_columns // 4
    e_offsets, a_offsets = numbers[6:].split([e_groups, a_groups])

    # E has one bit for each element: a byte holds two nibbles, the lower columns in the low one.
    assert e.is_contiguous()
    assert 8 * e.nbytes == e_cosize == 4 * e_groups
    memory = e.view(torch.uint8).flatten()
    found = memory[e_offsets // 8] >> e_offsets % 8 & 0xF
    assert torch.equal(found.view(e_rows, e_columns // 4), padded(nibbles, e_rows, e_columns // 4, ZERO_GROUP))

    # A's offsets count uncompressed elements, two for each value that is stored.
    assert values.is_contiguous()
    assert 2 * values.numel() == a_cosize == 4 * a_groups
    memory = values.view(bits_dtype).flatten()
    found = torch.stack((memory[a_offsets // 2], memory[a_offsets // 2 + 1]), dim=-1)
    assert torch.equal(found.view(a_rows, a_columns // 2), padded(bits, a_rows, a_columns // 2, 0))


def padded(matrix: Tensor, rows: int, columns: int, value: int) -> Tensor:
    """``matrix`` as the upper left corner of a larger one."""
    out = matrix.new_full((rows, columns), value)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out
