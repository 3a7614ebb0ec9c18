"""The contract of docs/numerics.md, against oracles in plain Python that share no code with the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24, unpack_metadata
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = [BF16, FP16]
ROWS = [0, 1, 63, 65]
COLUMNS = [8, 24, 1864]

# ---------------------------------------------------------------- oracles

_SIGNIFICAND, _MIN_EXPONENT, _MAX = {BF16: 8, FP16: 11}, {BF16: -126, FP16: -14}, {BF16: 3.3895314e38, FP16: 65504.0}


def round_once(x: float, dtype: torch.dtype) -> float:
    """A double rounded to nearest-even in the storage type, by the definition of its format."""
    if x == 0 or not math.isfinite(x):
        return x
    exponent = max(math.frexp(x)[1] - 1, _MIN_EXPONENT[dtype])
    quantum = 2.0 ** (exponent - _SIGNIFICAND[dtype] + 1)
    rounded = round(x / quantum) * quantum  # Python's round is half to even
    return math.copysign(math.inf, x) if abs(rounded) > _MAX[dtype] * (1 + 1e-7) else rounded


def round_sum(x: float, dtype: torch.dtype) -> float:
    """relu of an exact sum, rounded: what is selected from."""
    return x if math.isnan(x) else round_once(x, dtype) if x > 0 else 0.0


def keep_two(group: Sequence[float]) -> list[int]:
    """Positions kept of four: NaN before everything, then by magnitude, then the lower index."""
    order = sorted(range(4), key=lambda p: (not math.isnan(group[p]), -abs(group[p]), p))
    return sorted(order[:2])


def same(a: float, b: float) -> bool:
    """Equal, the sign of zero included; any NaN is like any other."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def assert_same(actual: Tensor, expected: Sequence[Sequence[float]]) -> None:
    assert list(actual.shape[:1]) == [len(expected)]
    for row, wanted in zip(actual.tolist(), expected, strict=True):
        assert all(same(a, b) for a, b in zip(row, wanted, strict=True)), (row, wanted)


def assert_pruned(packed: Sparse24, rows: Sequence[Sequence[float]], finish: Callable[[float], float]) -> None:
    """``packed`` is ``rows`` pruned by brute force: positions, then ``finish(value)`` of what is kept."""
    m, f = packed.shape
    nibbles, values = unpack_metadata(packed.metadata, m, f).tolist(), packed.values.tolist()
    assert len(rows) == m
    for r, row in enumerate(rows):
        assert len(row) == f
        for c in range(f // 4):
            i0, i1 = keep_two(row[4 * c : 4 * c + 4])
            assert nibbles[r][c] == i0 | i1 << 2, row[4 * c : 4 * c + 4]
            assert same(values[r][2 * c], finish(row[4 * c + i0]))
            assert same(values[r][2 * c + 1], finish(row[4 * c + i1]))


MEANINGS: dict[Activation, tuple[Callable[[float, torch.dtype], float], Callable[[float, torch.dtype], float]]] = {
    Activation.NONE: (lambda x, dtype: x, lambda v, dtype: v),
    Activation.RELU2: (round_sum, lambda v, dtype: round_once(v * v, dtype)),
    Activation.RELU: (round_sum, lambda v, dtype: v),
}
"""Of a value in the storage type: what is selected by, and what is stored of that. test_tables.py has what holds of
every activation; one that stands here as well is held to its bits."""
ACTIVATIONS = list(MEANINGS)


def assert_sparsified(h: Tensor, activation: Activation) -> Sparse24:
    packed = reference.sparsify24(h, activation)
    select, finish = MEANINGS[activation]
    rows = [[select(x, h.dtype) for x in row] for row in h.tolist()]
    assert_pruned(packed, rows, lambda v: finish(v, h.dtype))
    return packed


def from_bits(bits: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)


def whole_numbers(shape: tuple[int, ...], limit: int, dtype: torch.dtype, seed: int, density: float = 1.0) -> Tensor:
    """Small integers: sums of their products are exact in fp32, so every result can be told to the bit."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-limit, limit + 1, shape, generator=generator)
    return (numbers * (torch.rand(shape, generator=generator) < density)).to(dtype)


def exact_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> list[list[float]]:
    """A B^T + bias + residual in Python's unbounded integers, as rows of floats."""
    rows, columns = a.to(torch.int64).tolist(), b.to(torch.int64).tolist()
    extra = [0] * len(columns) if bias is None else bias.to(torch.int64).tolist()
    more = [[0] * len(columns)] * len(rows) if residual is None else residual.to(torch.int64).tolist()
    return [
        [
            float(sum(x * y for x, y in zip(row, column, strict=True)) + e + m)
            for column, e, m in zip(columns, extra, ms, strict=True)
        ]
        for row, ms in zip(rows, more, strict=True)
    ]


# ---------------------------------------------------------------- the oracles themselves


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_once_knows_every_value_and_every_midpoint(dtype: torch.dtype) -> None:
    finite = from_bits(range(0x7F80 if dtype is BF16 else 0x7C00), dtype).tolist()
    assert all(round_once(v, dtype) == v for v in finite)
    for k, (low, high) in enumerate(itertools.pairwise(finite)):
        assert round_once((low + high) / 2, dtype) == (low, high)[k % 2]
    assert round_once(finite[-1] * 1.01, dtype) == math.inf


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group_of_special_values(dtype: torch.dtype, activation: Activation) -> None:
    """All 8^4 groups of NaN, infinities, signed zeros, ties: order, ties and zero groups."""
    values = [math.nan, math.inf, -math.inf, 2.0, -2.0, 1.0, 0.0, -0.0]
    assert_sparsified(torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype).view(-1, 8), activation)


@given(
    rows=st.lists(
        st.lists(st.integers(0, 0xFFFF) | st.sampled_from([0, 0x8000, 0x7FFF, 0xFF81]), min_size=24, max_size=24),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_bits(rows: list[list[int]], dtype: torch.dtype, activation: Activation) -> None:
    assert_sparsified(torch.stack([from_bits(row, dtype) for row in rows]), activation)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("f", COLUMNS)
def test_shapes_and_densities(m: int, f: int, density: float) -> None:
    """Few distinct magnitudes, so that ties are everywhere."""
    for dtype, activation in itertools.product(DTYPES, ACTIVATIONS):
        h = whole_numbers((m, f), 3, dtype, seed=m + f, density=density)
        dense = assert_sparsified(h, activation).to_dense()
        assert dense.shape == (m, f)
        assert (dense.view(m, f // 4, 4) != 0).sum(dim=2).le(2).all()


def test_zero_groups() -> None:
    for zeros in ([0.0] * 8, [-0.0] * 8, [-1.0] * 8):
        packed = reference.sparsify24(torch.tensor([zeros]).bfloat16(), Activation.RELU2)
        assert unpack_metadata(packed.metadata, 1, 8).tolist() == [[4, 4]]
        assert packed.values.view(torch.int16).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_keeps_bits(dtype: torch.dtype) -> None:
    """Signs, -0.0 and NaN payloads; NaNs tie whatever their payload, so the lower two stay."""
    nan = 0x7FC1 if dtype is BF16 else 0x7E01
    bits = [[0x8000, 0x8000, 0, 0, nan, 0xFFFF, nan + 5, 0x7FFF], [0, 0x8001, nan | 0x8000, 1, 0, 0, 0, 0x8000]]
    packed = reference.sparsify24(torch.stack([from_bits(row, dtype) for row in bits]), Activation.NONE)
    kept = [[b & 0xFFFF for b in row] for row in packed.values.contiguous().view(torch.int16).tolist()]
    assert kept == [[0x8000, 0x8000, nan, 0xFFFF], [0x8001, nan | 0x8000, 0, 0]]


def test_strided_input() -> None:
    h = whole_numbers((64, 65), 3, FP16, seed=1)
    assert_sparsified(h.T[:65, :64], Activation.RELU2)
    assert_sparsified(h[::2, 1:25], Activation.NONE)


# ---------------------------------------------------------------- squaring and rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_square_is_rounded_once(dtype: torch.dtype) -> None:
    """All 32768 non-negative values, against the exact square in double: subnormals, overflow to +Inf, NaN."""
    values = from_bits(range(0x8000), dtype)
    expected = [round_once(v * v, dtype) for v in values.tolist()]
    groups = torch.nn.functional.pad(values.view(-1, 1), (0, 3)).view(-1, 8)
    assert_same(reference.sparsify24(groups, Activation.RELU2).values[:, 0::2].reshape(1, -1), [expected])
    one = torch.ones(1, 1, dtype=dtype)
    assert_same(reference.gemm(values.view(-1, 1), one, activation=Activation.RELU2).T, [expected])


@given(a=st.integers(0, 0xFFFF), b=st.integers(0, 0xFFFF), dtype=st.sampled_from(DTYPES))
def test_a_product_is_rounded_once(a: int, b: int, dtype: torch.dtype) -> None:
    x, y = from_bits([a], dtype).view(1, 1), from_bits([b], dtype).view(1, 1)
    product = x.item() * y.item()
    if product != 0 and math.isfinite(product) and not 2.0**-126 <= abs(product) < 2.0**128:
        return  # outside the normal range of the fp32 accumulator
    assert same(reference.gemm(x, y).item() + 0.0, round_once(product, dtype) + 0.0)
    count = reference.count_nonzeros(x, y.expand(8, 1))
    assert count.tolist() == [int(round_sum(product, dtype) != 0)] * 8


def test_fp16_overflows_to_infinity() -> None:
    """Sums from 65520 on round to +Inf, below to 65504; relu from 256 on squares to +Inf. bf16 does neither."""
    a = torch.tensor([[1.0, 1.0, 1.0]])
    b = torch.tensor(
        [[65504.0, 15.0, 0.0], [65504.0, 16.0, 0.0], [-65504.0, -16.0, 0.0], [255.75, 0.125, 0.0], [256.0, 0.0, 0.0]]
    )
    assert reference.gemm(a.half(), b.half()).tolist() == [[65504.0, math.inf, -math.inf, 255.875, 256.0]]
    squared = reference.gemm(a.half(), b.half(), activation=Activation.RELU2)
    assert squared.tolist() == [[math.inf, math.inf, 0.0, 65472.0, math.inf]]
    assert reference.gemm(a.bfloat16(), b.bfloat16(), activation=Activation.RELU2).isfinite().all()


def test_selection_sees_rounded_values() -> None:
    """bf16 rounds 257 to 256, so it ties with the 256 before it and loses, though its sum is larger."""
    x = torch.ones(1, 2, dtype=BF16)
    w1 = torch.tensor([[256, 0], [300, 0], [256, 1], [0, 0]] * 2, dtype=BF16)
    packed = reference.gemm_relu2_24(x, w1)
    assert unpack_metadata(packed.metadata, 1, 8).tolist() == [[0b0100, 0b0100]]
    assert packed.values.tolist() == [[65536.0, round_once(300.0**2, BF16)] * 2]


def test_sums_are_not_rounded_before_the_bias() -> None:
    """256 + 1 + 1: rounded to bf16 after every step it would stay 256."""
    a, b = torch.ones(1, 1, dtype=BF16), torch.full((1, 1), 256.0, dtype=BF16)
    one = torch.ones(1, dtype=BF16)
    assert reference.gemm(a, b, bias=one, residual=one.view(1, 1)).item() == 258.0


def test_float64_accumulation_is_exact() -> None:
    """2^25 + 1 + 1 - 2^25, one by one: fp32 loses the ones, whatever the order of the first two."""
    a, b = torch.ones(1, 3, dtype=BF16), torch.tensor([[2.0**25, 1.0, 1.0]], dtype=BF16)
    bias = torch.tensor([-(2.0**25)], dtype=BF16)
    assert reference.gemm(a, b, bias, accumulate=torch.float64).item() == 2.0
    packed = reference.gemm_relu2_24(a, b.expand(8, 3), bias.expand(8), accumulate=torch.float64)
    assert packed.values.tolist() == [[4.0] * 4]
    assert reference.count_nonzeros(a, b.expand(8, 3), bias.expand(8), accumulate=torch.float64).tolist() == [1] * 8
    w2 = torch.eye(8, dtype=BF16)
    assert reference.ffn(a, b.expand(8, 3), w2, bias.expand(8), accumulate=torch.float64).sum().item() == 16.0


# ---------------------------------------------------------------- the products, bit for bit

problems = settings(max_examples=25)(
    given(
        m=st.integers(0, 9),
        f8=st.integers(1, 4),
        d8=st.integers(1, 4),
        limit=st.sampled_from([1, 4, 40]),
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from(DTYPES),
        extras=st.booleans(),
    )
)


@problems
def test_gemm(m: int, f8: int, d8: int, limit: int, seed: int, dtype: torch.dtype, extras: bool) -> None:
    a, b = whole_numbers((m, 8 * d8), limit, dtype, seed), whole_numbers((8 * f8, 8 * d8), limit, dtype, seed + 1)
    bias = whole_numbers((8 * f8,), limit, dtype, seed + 2) if extras else None
    residual = whole_numbers((m, 8 * f8), limit, dtype, seed + 3) if extras else None
    sums = exact_product(a, b, bias, residual)
    assert_same(reference.gemm(a, b, bias, residual), [[round_once(x, dtype) for x in row] for row in sums])
    squares = [[round_once(round_sum(x, dtype) ** 2, dtype) for x in row] for row in sums]
    assert_same(reference.gemm(a, b, bias, residual, Activation.RELU2), squares)


@problems
def test_gemm_relu2_24_and_counts(
    m: int, f8: int, d8: int, limit: int, seed: int, dtype: torch.dtype, extras: bool
) -> None:
    x, w1 = whole_numbers((m, 8 * d8), limit, dtype, seed), whole_numbers((8 * f8, 8 * d8), limit, dtype, seed + 1)
    bias = whole_numbers((8 * f8,), limit, dtype, seed + 2) if extras else None
    rows = [[round_sum(x, dtype) for x in row] for row in exact_product(x, w1, bias)]
    assert_pruned(reference.gemm_relu2_24(x, w1, bias), rows, lambda v: round_once(v * v, dtype))
    counts = reference.count_nonzeros(x, w1, bias)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [sum(row[c] != 0 for row in rows) for c in range(8 * f8)]


@problems
def test_spgemm(m: int, f8: int, d8: int, limit: int, seed: int, dtype: torch.dtype, extras: bool) -> None:
    s = reference.sparsify24(whole_numbers((m, 8 * f8), limit, dtype, seed), Activation.NONE)
    w2 = whole_numbers((8 * d8, 8 * f8), limit, dtype, seed + 1)
    bias = whole_numbers((8 * d8,), limit, dtype, seed + 2) if extras else None
    residual = whole_numbers((m, 8 * d8), limit, dtype, seed + 3) if extras else None
    sums = exact_product(s.to_dense(), w2, bias, residual)
    assert_same(reference.spgemm(s, w2, bias, residual), [[round_once(x, dtype) for x in row] for row in sums])


@settings(max_examples=25)
@given(
    m=st.integers(0, 9), f8=st.integers(1, 3), d8=st.integers(1, 2), seed=st.integers(0, 2**32), extras=st.booleans()
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn(dtype: torch.dtype, m: int, f8: int, d8: int, seed: int, extras: bool) -> None:
    """Brute force from X to Y3: squares of at most 51^2 rounded to bf16, and sums still exact in fp32."""
    d, f = 8 * d8, 8 * f8
    x, w1 = whole_numbers((m, d), 1, dtype, seed), whole_numbers((f, d), 3, dtype, seed + 1)
    w2 = whole_numbers((d, f), 3, dtype, seed + 2)
    b1 = whole_numbers((f,), 3, dtype, seed + 3) if extras else None
    b2 = whole_numbers((d,), 3, dtype, seed + 4) if extras else None
    pruned = torch.zeros(m, f, dtype=torch.int64)
    for r, row in enumerate(exact_product(x, w1, b1)):
        values = [round_sum(t, dtype) for t in row]
        for c in range(0, f, 4):
            for p in keep_two(values[c : c + 4]):
                pruned[r, c + p] = int(round_once(values[c + p] ** 2, dtype))
    expected = [[round_once(t, dtype) for t in row] for row in exact_product(pruned, w2, b2)]
    assert_same(reference.ffn(x, w1, w2, b1, b2), expected)


# ---------------------------------------------------------------- NaN and Inf through the products


def test_nan_and_infinity_reach_only_their_row() -> None:
    x = torch.ones(3, 8, dtype=BF16)
    x[0, 3], x[1, 3] = math.nan, math.inf
    w1 = torch.ones(8, 8, dtype=BF16)
    w1[1] = -1
    packed = reference.gemm_relu2_24(x, w1)
    assert packed.values[0].isnan().all()
    assert packed.values[1].isposinf().all()
    assert packed.values[2].tolist() == [64.0] * 4
    assert unpack_metadata(packed.metadata, 3, 8).tolist() == [[0b0100, 0b0100], [0b1000, 0b0100], [0b1000, 0b0100]]
    assert reference.count_nonzeros(x, w1).tolist() == [3, 1, 3, 3, 3, 3, 3, 3]
    y = reference.spgemm(packed, torch.ones(8, 8, dtype=BF16))
    assert y[0].isnan().all()
    assert y[1].isposinf().all()
    assert y[2].tolist() == [256.0] * 8


def test_counts_are_after_rounding_and_before_squaring() -> None:
    """In fp16, 2^-26 rounds to zero and is not counted; 2^-20 squares to zero and is."""
    x = torch.tensor([[2.0**-13]], dtype=FP16)
    w1 = torch.tensor([[2.0**-13], [2.0**-7], [-1.0], [0.0]] * 2, dtype=FP16)
    assert reference.count_nonzeros(x, w1).tolist() == [0, 1, 0, 0] * 2
    packed = reference.gemm_relu2_24(x, w1)
    assert unpack_metadata(packed.metadata, 1, 8).tolist() == [[0b0100, 0b0100]]
    assert packed.values.tolist() == [[0.0] * 4]


# ---------------------------------------------------------------- refusals


def refused() -> list[tuple[str, Callable[[], object]]]:
    a, b = torch.ones(4, 16, dtype=BF16), torch.ones(8, 16, dtype=BF16)
    s = reference.sparsify24(a, Activation.NONE)
    return [
        (r"float32", lambda: reference.gemm(a.float(), b)),
        (r"one dtype", lambda: reference.gemm(a, b.half())),
        (r"one device", lambda: reference.gemm(a, b.to("meta"))),
        (r"\[any, 16\]", lambda: reference.gemm(a, b[:, :8])),
        (r"\[any, any\]", lambda: reference.gemm(a[0], b)),
        (r"bias.*\[8\]", lambda: reference.gemm(a, b, a[0, :4])),
        (r"bias.*\[8\]", lambda: reference.gemm(a, b, a[:1, :8])),
        (r"residual.*\[4, 8\]", lambda: reference.gemm(a, b, residual=a)),
        (r"multiple of 8", lambda: reference.gemm_relu2_24(a, b[:4])),
        (r"\[any, 16\]", lambda: reference.spgemm(s, b[:, :8])),
        (r"one dtype", lambda: reference.spgemm(s, b.half())),
        (r"h has shape", lambda: reference.sparsify24(a[0], Activation.RELU2)),
        (r"float32", lambda: reference.sparsify24(a.float(), Activation.RELU2)),
        (r"multiple of 8", lambda: reference.sparsify24(a[:, :12], Activation.NONE)),
    ]


@pytest.mark.parametrize("case", range(len(refused())))
def test_one_clear_sentence(case: int) -> None:
    complaint, call = refused()[case]
    with pytest.raises(Unsupported, match=complaint):
        call()
