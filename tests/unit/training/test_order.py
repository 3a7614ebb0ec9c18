"""Groups along tokens: a permutation, and who is in a group with whom."""

from __future__ import annotations

import pytest
import torch

from srelu24.training.order import check_stride, padded, token_order
from srelu24_gen.errors import Unsupported

CPU = torch.device("cpu")


def groups(m: int, stride: int | None) -> list[list[int]]:
    order: list[int] = token_order(m, stride, CPU).tolist()
    return [order[i : i + 4] for i in range(0, len(order), 4)]


@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 100, 128, 1000])
@pytest.mark.parametrize("stride", [None, 0, 1, 3, 8, 10**6])
def test_an_order_is_a_permutation_of_whole_blocks(m: int, stride: int | None) -> None:
    order = token_order(m, stride, CPU)
    assert len(order) == padded(m) == (m + 15) // 16 * 16
    assert sorted(order.tolist()) == list(range(padded(m)))


def test_neighbours_are_groups_of_four_in_a_row() -> None:
    assert groups(32, 0) == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(8)]


def test_natural_groups_are_those_of_the_accumulators() -> None:
    expected = [[base + 2 * i + step for step in (0, 8, 1, 9)] for base in (0, 16) for i in range(4)]
    assert groups(32, 1) == expected


def test_a_stride_keeps_tokens_apart() -> None:
    for m, stride in ((64 * 16, 64), (64 * 16, 16), (1600, None)):
        apart = stride or m // 16
        for group in groups(m, stride):
            distances = [abs(a - b) for a in group for b in group if a != b]
            assert min(distances) == apart
            assert all(d % apart == 0 for d in distances)


def test_tokens_beyond_the_last_whole_band_keep_the_natural_order() -> None:
    assert groups(16 * 5 + 32, 5)[20:] == [[80 + t for t in group] for group in groups(32, 1)]


@pytest.mark.parametrize("stride", [-1, 1.0, True, "1"])
def test_a_stride_is_a_whole_number(stride: object) -> None:
    with pytest.raises(Unsupported, match="token_stride is"):
        check_stride(stride)  # type: ignore[arg-type]
