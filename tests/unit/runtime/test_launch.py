"""What the host works out for the kernels, walked here as the kernels walk it: divisions, tiles, TMA boxes."""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cuda.bindings import driver
from hypothesis import example, given
from hypothesis import strategies as st

from srelu24.runtime import arguments, gemm, tensor_map
from srelu24.runtime.gemm import GemmLauncher
from srelu24_gen import space
from srelu24_gen.bindings import load_block
from srelu24_gen.errors import LaunchError
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.target import TARGETS
from srelu24_gen.work_plan import WorkPlan, plan_work
from stubbed_gpu import loaded_kernel

MOST = 2**31 - 1


def fast_divmod(packed: bytes, dividend: int) -> tuple[int, int]:
    """cutlass::FastDivmod::operator() on the device."""
    divisor, multiplier, shift_right = struct.unpack("<iII", packed)
    quotient = (dividend * multiplier >> 32) >> shift_right if divisor != 1 else dividend  # __umulhi
    return quotient, dividend - quotient * divisor


@given(st.integers(1, MOST), st.integers(0, MOST))
@example(1, MOST)
@example(2, MOST)
@example(3, MOST)
@example(MOST, MOST)
@example(MOST, MOST - 1)
@example(2**30, MOST)
@example(2**30 + 1, MOST)
def test_fast_divmod_is_exact(divisor: int, dividend: int) -> None:
    assert fast_divmod(arguments.fast_divmod(divisor), dividend) == divmod(dividend, divisor)


@given(st.integers(1, 2**20), st.integers(0, 2**10))
def test_fast_divmod_is_exact_around_multiples(divisor: int, quotient: int) -> None:
    packed = arguments.fast_divmod(divisor)
    for dividend in (quotient * divisor + d for d in (-1, 0, 1)):
        if dividend >= 0:
            assert fast_divmod(packed, dividend) == divmod(dividend, divisor)


# ------------------------------------------------------------------------------------------------ who does which tile


@dataclass(frozen=True)
class Piece:
    """A tile, or a part of one along K, in k-blocks."""

    m: int
    n: int
    k_begin: int
    k_end: int


def raster(plan: WorkPlan, index: int) -> tuple[int, int]:
    """``raster`` of work.cuh."""
    band, in_band = divmod(index, plan.group * plan.tiles_n)
    full_bands, last_height = divmod(plan.tiles_m, plan.group)
    n, m = divmod(in_band, plan.group if band < full_bands else last_height)
    return band * plan.group + m, plan.tiles_n - 1 - n if band % 2 else n


def work_of(plan: WorkPlan, cluster: int) -> Iterator[Piece]:
    """What one cluster does, in its order: whole tiles, then its units of the split ones, the later tile first."""
    for index in range(cluster, plan.first_tile, plan.clusters):
        yield Piece(*raster(plan, index), 0, plan.k_blocks)
    begin, end = (c * plan.units + min(c, plan.extra) for c in (cluster, cluster + 1))
    if begin == end:
        return
    for tile in range((end - 1) // plan.tile_units, begin // plan.tile_units - 1, -1):
        start = tile * plan.tile_units
        first, last = max(begin - start, 0), min(end - start, plan.tile_units)
        yield Piece(*raster(plan, plan.first_tile + tile), 4 * first, min(4 * last, plan.k_blocks))


@given(
    st.sampled_from(space.tiles(TARGETS["h200"])),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 9000),
    st.integers(1, 600),
    st.integers(1, 300),
    st.sampled_from([114, 132, 7]),
)
def test_every_tile_is_done_exactly_once(
    tile: tuple[int, int], cluster_m: int, stream_k: bool, group: int, m: int, n8: int, k8: int, sm_count: int
) -> None:
    tile_m, tile_n = tile
    config = KernelConfig(*tile, cluster_m=cluster_m, stream_k=stream_k, raster_group=group)
    plan = plan_work(config, m, 8 * n8, 8 * k8, sm_count)
    tiles = set(itertools.product(range(-(-m // (tile_m * cluster_m))), range(-(-8 * n8 // tile_n))))
    k_blocks = -(-8 * k8 // 64)
    done: Counter[tuple[int, int, int]] = Counter()
    assert plan.clusters <= sm_count // cluster_m
    for cluster in range(plan.clusters):
        pieces = list(work_of(plan, cluster))
        assert pieces, "a cluster without work would hang its ring"
        split = [p for p in pieces if (p.k_begin, p.k_end) != (0, plan.k_blocks)]
        assert len(split) <= 2
        assert sum(p.k_end < plan.k_blocks for p in split) <= 1, "a cluster has one slot for partial sums"
        assert stream_k or not split
        for p in pieces:
            assert p.k_begin < p.k_end
            done.update((p.m, p.n, k) for k in range(p.k_begin, p.k_end))
    assert set(done) == {(*tile, k) for tile in tiles for k in range(k_blocks)}
    assert set(done.values()) == {1}


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 200), st.sampled_from([2, 7, 66, 132]))
def test_no_tile_is_cut_into_many_pieces(m: int, n8: int, k8: int, sm_count: int) -> None:
    plan = plan_work(KernelConfig(tile_m=64, tile_n=128, cluster_m=1, stream_k=True), 8 * m, 8 * n8, 8 * k8, sm_count)
    pieces = Counter((p.m, p.n) for cluster in range(plan.clusters) for p in work_of(plan, cluster))
    split = [pieces[raster(plan, index)] for index in range(plan.first_tile, plan.tiles)]
    if len(split) > sm_count:  # the last whole wave too: every share is at least a tile
        assert max(split) <= 2
        return
    most = 4 if plan.tiles >= sm_count else math.isqrt(plan.tile_units) + 1  # each cluster's share ends one piece more
    assert sum(split) <= most * len(split)
    if split:  # and none much finer than the others: shares differ by the one unit that is the least piece
        assert max(split) <= -(-plan.tile_units // max(1, plan.units)) + 1


def test_a_band_stays_on_one_group_of_rows_and_turns_round_at_its_end() -> None:
    plan = plan_work(KernelConfig(tile_m=128, cluster_m=1, raster_group=2), 4 * 128, 3 * 256, 64, 132)
    walk = [raster(plan, index) for index in range(plan.tiles)]
    assert walk == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (3, 2), (2, 1), (3, 1), (2, 0), (3, 0)]


# ------------------------------------------------------------------------------------------------- the load order of B


@dataclass(frozen=True)
class Box:
    """A tensor map over rows of B, without its innermost dimension K. Rows are numbered by their address."""

    first: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def load(self, *start: int) -> list[int | None]:
        """The rows that land one after the other in shared memory; None is zeros."""
        rows: list[int | None] = []
        for at in itertools.product(*(range(size) for size in reversed(self.box))):
            index = [s + i for s, i in zip(start, reversed(at), strict=True)]
            inside = all(i < size for i, size in zip(index, self.dims, strict=True))
            rows.append(self.first + sum(i * s for i, s in zip(index, self.strides, strict=True)) if inside else None)
        return rows


@pytest.mark.parametrize("op", [Op.GEMM, Op.SPGEMM, Op.GEMM_RELU2_24])
@pytest.mark.parametrize("cluster_m", [1, 2])
@pytest.mark.parametrize("n", [8, 16, 24, 40, 64, 72, 120, 128, 136, 248, 256, 264, 320, 328, 1864])
def test_b_lands_in_the_order_of_its_load(op: Op, cluster_m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stride, k = 72, 64

    def record(
        dtype: DType, address: int, *, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], **_: int
    ) -> Box:
        assert (dims[0], box[0]) == (k, 64)
        assert all(0 < size <= 256 for size in box)
        assert all(s % stride == 0 for s in strides)
        rows = tuple(s // stride for s in strides)
        return Box(address // 2 // stride, dims[1:], rows, box[1:])

    monkeypatch.setattr(gemm, "tensor_map", record)
    activation = Activation.RELU2 if op is Op.GEMM_RELU2_24 else Activation.NONE
    spec = KernelSpec(Family(op, DType.BF16, activation), KernelConfig(cluster_m=cluster_m))
    launcher = GemmLauncher(spec, loaded_kernel())
    share, *rows = launcher._encode_maps_of_b(0, n, k, stride)
    assert isinstance(share, Box)

    block, share_rows = load_block(op), 256 // cluster_m
    run, end = block // 4, n // block * block
    for column in range(0, -(-n // 256) * 256, share_rows):
        if end < n and column <= end < column + share_rows:  # as tile_load.cuh decides: the ragged end
            landed = []
            for first in range(0, share_rows, 32):
                which = rows[run == 16 and first % 64 != 0]
                assert isinstance(which, Box)
                landed += which.load(0, (column + first // block * block) // run, 0)
        else:
            landed = share.load(0, 0, 0, column // block)
        # Accumulator column 8j + 2t + b of a block holds output column run * t + 2j + b.
        expected = [
            column + at // block * block + run * (at % 8 // 2) + 2 * (at % block // 8) + at % 2
            for at in range(share_rows)
        ]
        phantom = (
            8 if (op, n) == (Op.GEMM_RELU2_24, 8) else 0
        )  # its rows 8 to 15 do not exist, what is there is dropped
        for got, wanted in zip(landed, expected, strict=True):
            if wanted < n:
                assert got == wanted
            else:
                assert got is None or (phantom and got < n)


# --------------------------------------------------------------------------------------------------------- the rest


def test_a_tensor_is_described_in_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    # A thread that has used torch for nothing but memory from the free list has none, and the driver refuses.
    events: list[str] = []

    def refuse(*_: object) -> tuple[driver.CUresult, None]:
        events.append("description")
        return driver.CUresult.CUDA_ERROR_INVALID_VALUE, None

    monkeypatch.setattr(tensor_map, "make_context_current", lambda: events.append("context"))
    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", refuse)
    with pytest.raises(LaunchError, match=r"describing a tensor of \(64, 8\) elements"):
        tensor_map.tensor_map(DType.BF16, 0, dims=(64, 8), strides=(64,), box=(64, 8), swizzle_bytes=128)
    assert events == ["context", "description"]


def test_the_row_stride_of_a_single_row_is_made_up() -> None:
    wide = torch.zeros(4, 100, dtype=torch.bfloat16)
    assert arguments.row_stride(wide[:, :20]) == 100
    assert arguments.row_stride(wide[:1, :20]) == 24  # torch may say anything; the TMA needs a multiple of 16 bytes
    assert arguments.row_stride(wide[:1, :4]) == 8
    assert arguments.row_stride(wide.to(torch.float8_e4m3fn)[:1, :20]) == 32
