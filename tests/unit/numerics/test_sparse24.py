"""Sparse24: where every bit of values and metadata lies, validation, torch plumbing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from packed_data import (
    COLUMNS,
    DTYPES,
    LEGAL_NIBBLES,
    ROWS,
    random_fp8,
    random_nibbles,
    random_packed,
)
from srelu24.numerics.sparse24 import (
    FP8_DTYPES,
    FragmentOrder,
    Sparse24,
    metadata_shape,
    pack_metadata,
    row_stride,
    unpack_metadata,
)
from srelu24_gen.errors import Unsupported

# ---------------------------------------------------------------- fragment order


@pytest.mark.parametrize(("m", "f"), [(1, 8), (63, 24), (65, 264), (70, 520)])
def test_fragment_order_word_by_word(m: int, f: int) -> None:
    """Every word of E against the sentence in docs/architecture.md, padding included."""
    nibbles = random_nibbles(m, f)
    e = pack_metadata(nibbles)
    assert e.shape == metadata_shape(m, f)
    assert e.dtype == torch.int32

    def half(row: int, column: int) -> int:
        groups = [(column + 4 * n) // 4 for n in range(4)]
        return sum((int(nibbles[row, c]) if row < m and c < f // 4 else 4) << 4 * n for n, c in enumerate(groups))

    for i, j in torch.cartesian_prod(*map(torch.arange, e.shape[:2])).tolist():
        for thread in range(128):
            w, g, t = thread // 32, thread % 32 // 4, thread % 4
            for q in range(4):
                row, column = 64 * i + 16 * w + g, 256 * j + 64 * q + 16 * t
                word = half(row, column) | half(row + 8, column) << 16
                assert int(e[i, j, thread, q]) & 0xFFFFFFFF == word


@pytest.mark.parametrize(("m", "f"), [(1, 16), (63, 48), (65, 272), (70, 528)])
def test_8_bit_fragment_order_word_by_word(m: int, f: int) -> None:
    """Every word of E against the sentence in docs/fp8.md, padding included."""
    nibbles = random_nibbles(m, f)
    e = pack_metadata(nibbles, FragmentOrder.BITS8)
    for i, j in torch.cartesian_prod(*map(torch.arange, e.shape[:2])).tolist():
        for thread in range(128):
            w, g, t = thread // 32, thread % 32 // 4, thread % 4
            for q in range(4):
                row, column = 64 * i + 16 * w + g + 8 * (t & 1), 256 * j + 64 * q + 32 * (t >> 1)
                groups = [column // 4 + n for n in range(8)]
                word = sum(
                    (int(nibbles[row, c]) if row < m and c < f // 4 else 4) << 4 * n for n, c in enumerate(groups)
                )
                assert int(e[i, j, thread, q]) & 0xFFFFFFFF == word


@given(m=st.integers(0, 200), f16=st.integers(1, 40), seed=st.integers(0, 2**32), order=st.sampled_from(FragmentOrder))
def test_metadata_is_a_bijection(m: int, f16: int, seed: int, order: FragmentOrder) -> None:
    """Any 16 nibble values survive, so no two groups share bits; what is left over is zero groups."""
    f = order.granule * f16
    nibbles = torch.randint(16, (m, f // 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    e = pack_metadata(nibbles, order)
    assert e.shape == metadata_shape(m, f)
    assert torch.equal(unpack_metadata(e, m, f, order), nibbles)
    blocks_m, blocks_f = e.shape[:2]
    everything = unpack_metadata(e, 64 * blocks_m, 256 * blocks_f, order)
    assert (everything[m:] == 4).all()
    assert (everything[:, f // 4 :] == 4).all()


def test_metadata_from_a_strided_view() -> None:
    nibbles = random_nibbles(40, 64)
    assert torch.equal(pack_metadata(nibbles.T.contiguous().T), pack_metadata(nibbles))


# ---------------------------------------------------------------- the dense matrix


@settings(max_examples=40)
@given(m=st.sampled_from([0, 1, 63, 65]), f=st.sampled_from([8, 24, 264]), dtype=st.sampled_from(DTYPES))
def test_to_dense_bit_by_bit(m: int, f: int, dtype: torch.dtype) -> None:
    packed = random_packed(m, f, dtype)
    bits = packed.values.contiguous().view(torch.int16).tolist()
    expected = [[0] * f for _ in range(m)]
    for row, groups in enumerate(random_nibbles(m, f).tolist()):
        for c, nibble in enumerate(groups):
            expected[row][4 * c + nibble % 4] = bits[row][2 * c]
            expected[row][4 * c + nibble // 4] = bits[row][2 * c + 1]
    dense = packed.to_dense()
    assert dense.shape == (m, f)
    assert dense.is_contiguous()
    assert dense.view(torch.int16).tolist() == expected


# ---------------------------------------------------------------- construction


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", COLUMNS)
@pytest.mark.parametrize("m", ROWS)
def test_empty(m: int, f: int, dtype: torch.dtype) -> None:
    packed = Sparse24.empty(m, f, dtype, "cpu")
    assert packed.shape == (m, f)
    assert packed.dtype == dtype
    assert packed.device == torch.device("cpu")
    assert packed.values.shape == (m, f // 2)
    assert packed.values.stride() == (-(-f // 2 // 8) * 8, 1)
    assert packed.metadata.shape == (-(-m // 64), -(-f // 256), 128, 4)
    storage = packed.values.as_strided((m, row_stride(f)), (row_stride(f), 1))
    assert storage[:, : f // 2].isnan().all()
    assert not storage[:, f // 2 :].any()


@pytest.mark.parametrize(("m", "f"), [(-1, 8), (1, 0), (1, -8), (1, 4), (1, 12)])
def test_shapes_that_cannot_be(m: int, f: int) -> None:
    with pytest.raises(Unsupported, match="multiple of 8"):
        Sparse24.empty(m, f, torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.float8_e4m3fnuz])
def test_dtypes_that_cannot_be(dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported, match=r"packed values are torch\..*torch\.bfloat16, torch\.float16"):
        Sparse24.empty(1, 8, dtype, "cpu")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v, e: (v[:-1], e), "values are"),
        (lambda v, e: (v.contiguous(), e), "strides"),
        (lambda v, e: (v.mT.contiguous().mT, e), "strides"),
        (lambda v, e: (v, e[:1]), "metadata"),
        (lambda v, e: (v, e.long()), "metadata"),
        (lambda v, e: (v, e.mT.contiguous().mT), "non-contiguous"),
        (lambda v, e: (v, e.to("meta")), "one device"),
        (lambda v, e: (v.float(), e), "bfloat16"),
    ],
)
def test_fields_that_do_not_fit(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], complaint: str) -> None:
    good = random_packed(65, 24)
    with pytest.raises(Unsupported, match=complaint):
        Sparse24(*change(good.values, good.metadata), good.shape)


@pytest.mark.parametrize(
    "nibbles",
    [torch.zeros(4, 6, dtype=torch.int32), torch.zeros(24, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)],
)
def test_pack_metadata_refuses(nibbles: Tensor) -> None:
    with pytest.raises(Unsupported):
        pack_metadata(nibbles)


def test_unpack_metadata_refuses_another_shape() -> None:
    with pytest.raises(Unsupported, match="metadata"):
        unpack_metadata(pack_metadata(random_nibbles(65, 264)), 64, 264)


# ---------------------------------------------------------------- torch plumbing


def test_pytree() -> None:
    packed = random_packed(65, 24)
    leaves, spec = pytree.tree_flatten({"s": packed})
    assert leaves[0] is packed.values
    assert leaves[1] is packed.metadata
    back = pytree.tree_unflatten(leaves, spec)["s"]
    assert isinstance(back, Sparse24)
    assert back.shape == (65, 24)
    nothing = pytree.tree_map(lambda _: None, packed)  # transforms put placeholders in the place of tensors
    assert nothing.values is None
    assert nothing.shape == (65, 24)


def test_through_torch_compile() -> None:
    """In and out of a compiled function without a graph break, and again with another M."""

    def step(s: Sparse24, scale: Tensor) -> tuple[Sparse24, Tensor]:
        scaled = Sparse24.empty(*s.shape, s.dtype, s.device)
        scaled.values.copy_(s.values * scale)
        scaled.metadata.copy_(s.metadata)
        return scaled, s.to_dense().sum(dim=1)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    scale = torch.tensor(2.0, dtype=torch.bfloat16)
    for m in (65, 3, 130):
        packed = Sparse24.empty(m, 24, torch.bfloat16, "cpu")
        packed.values.copy_(torch.randn(m, 12))
        packed.metadata.copy_(pack_metadata(random_nibbles(m, 24)))
        scaled, sums = compiled(packed, scale)
        assert isinstance(scaled, Sparse24)
        assert scaled.shape == (m, 24)
        assert torch.equal(scaled.to_dense(), packed.to_dense() * 2)
        assert torch.equal(sums, packed.to_dense().sum(dim=1))


def test_repr_is_short() -> None:
    assert repr(random_packed(65, 24)) == "Sparse24(65x24, torch.bfloat16, cpu)"


def test_random_nibbles_cover_all_six() -> None:
    assert set(random_nibbles(8, 64).flatten().tolist()) == set(LEGAL_NIBBLES)


# ---------------------------------------------------------------- 8-bit values


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize(("m", "f"), [(0, 16), (1, 16), (65, 48), (130, 1872)])
def test_8_bit_values_to_dense_and_through_cutlass(m: int, f: int, dtype: torch.dtype) -> None:
    packed = random_fp8(m, f, dtype)
    assert packed.order is FragmentOrder.BITS8
    assert packed.values.stride(0) % 16 == 0 or m < 2
    nibbles = random_nibbles(m, f)
    dense, kept = packed.to_dense().view(torch.uint8), packed.values.view(torch.uint8)
    expected = torch.zeros(m, f // 4, 4, dtype=torch.uint8)
    for value, position in ((kept[:, 0::2], nibbles & 3), (kept[:, 1::2], nibbles >> 2)):
        expected.scatter_(2, position[..., None].long(), value[..., None])
    assert torch.equal(dense, expected.view(m, f))
    for tile_k in (64, 128, 256):
        values, e = packed.to_cutlass(tile_k)
        back = Sparse24.from_cutlass(values, e, (m, f), tile_k)
        assert (back.order, back.dtype) == (packed.order, dtype)
        assert torch.equal(back.metadata, packed.metadata)
        assert torch.equal(back.values.view(torch.uint8), kept)


def test_16_bit_values_may_have_8_bit_metadata_but_not_the_reverse() -> None:
    packed = Sparse24.empty(3, 32, torch.bfloat16, "cpu", FragmentOrder.BITS8)
    assert repr(packed) == "Sparse24(3x32, torch.bfloat16, cpu, 8-bit metadata)"
    packed.values.copy_(torch.arange(48.0).view(3, 16))
    packed.metadata.copy_(pack_metadata(random_nibbles(3, 32), FragmentOrder.BITS8))
    e = pack_metadata(random_nibbles(3, 32))
    assert torch.equal(packed.to_dense(), Sparse24(packed.values, e, (3, 32)).to_dense())
    assert torch.equal(packed.to_cutlass()[1], Sparse24(packed.values, e, (3, 32)).to_cutlass()[1])
    with pytest.raises(Unsupported, match="16-bit order; 8-bit is needed"):
        Sparse24.empty(3, 32, torch.float8_e4m3fn, "cpu", FragmentOrder.BITS16)
    with pytest.raises(Unsupported, match="multiple of 16"):
        Sparse24.empty(3, 24, torch.float8_e4m3fn, "cpu")
    with pytest.raises(Unsupported, match=r"tile_k is 32; CUTLASS's 8-bit sparse GEMM needs a positive multiple of 64"):
        random_fp8(3, 32).to_cutlass(32)


def test_the_order_survives_a_pytree() -> None:
    packed = random_fp8(5, 32)
    again = pytree.tree_map(lambda t: t, packed)
    assert again.order is FragmentOrder.BITS8
