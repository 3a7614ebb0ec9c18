"""The checks of what a caller gives: wrong input has one clear sentence, unusual input has a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srelu24.runtime.operands import check_ffn, check_matrix, check_vector, kernel_reason
from srelu24_gen.errors import Unsupported

D, F = 16, 32


def t(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (0, D)])
def test_operands_that_fit(shape: tuple[int, ...]) -> None:
    check_ffn(t(*shape), t(F, D), t(D, F), None, None)
    check_ffn(t(*shape), t(F, D), t(D, F), t(F), t(D))


HALF = torch.float16


@pytest.mark.parametrize(
    ("x", "w1", "w2", "b1", "b2", "words"),
    [
        (t(), t(F, D), t(D, F), None, None, r"x has no dimensions; it must be \[..., D\]"),
        (t(3, 8), t(F, D), t(D, F), None, None, r"w1 has shape \[32, 16\]; \[\*, 8\] is needed"),
        (t(3, D), t(D), t(D, F), None, None, r"w1 has shape \[16\]; \[\*, 16\]"),
        (t(3, D), t(F, D, 1), t(D, F), None, None, r"w1 has shape \[32, 16, 1\]"),
        (t(3, D), t(), t(D, F), None, None, r"w1 has shape \[\]"),
        (t(3, D), t(F, D), t(F, D), None, None, r"w2 has shape \[32, 16\]; \[16, 32\] is needed"),
        (t(3, D), t(F, D), t(D, F), t(D), None, r"b1 has shape \[16\]; \[32\] is needed"),
        (t(3, D), t(F, D), t(D, F), t(1, F), None, r"b1 has shape \[1, 32\]; \[32\] is needed"),
        (t(3, D), t(F, D), t(D, F), None, t(F), r"b2 has shape \[32\]; \[16\] is needed"),
        (t(3, D), t(F, D, dtype=HALF), t(D, F), None, None, "w1 is torch.float16 and the input torch.bfloat16"),
        (t(3, D), t(F, D), t(D, F), None, t(D, dtype=HALF), "b2 is torch.float16 and the input torch.bfloat16"),
        (t(3, D, dtype=torch.int8), t(F, D, dtype=torch.int8), t(D, F), None, None, "w1 is torch.int8; bfloat16 or"),
        (t(3, D), t(F, D, device="meta"), t(D, F), None, None, "w1 is on meta and the input on cpu; move both"),
    ],
)
def test_operands_that_do_not_fit_are_named(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, words: str
) -> None:
    with pytest.raises(Unsupported, match=words) as caught:
        check_ffn(x, w1, w2, b1, b2)
    assert str(caught.value).count("\n") == 0


def test_any_size_is_any_size() -> None:
    check_matrix("w", t(5, 7), (None, None), t(1))
    check_vector("b", None, 3, t(1))
    with pytest.raises(Unsupported, match=r"w has shape \[5, 7\]; \[5, 8\]"):
        check_matrix("w", t(5, 7), (5, 8), t(1))


def wide(columns: int, stride: int, rows: int = 3) -> Tensor:
    return t(rows, stride)[:, :columns]


@pytest.mark.parametrize(
    "tensors",
    [
        (t(3, 16), t(8, 16), t(16, 8)),
        (t(3, 24, dtype=HALF), t(8, 24, dtype=HALF), t(24, 8, dtype=HALF), t(8, dtype=HALF)),
        (wide(16, 24), t(8, 16), None),
        (wide(16, 20, rows=1), t(8, 16)),  # one row has no stride to speak of
        (t(0, 16), t(8, 16)),
        (t(3, 8), t(8, 8)),
    ],
)
def test_operands_that_the_kernels_read(tensors: tuple[Tensor | None, ...]) -> None:
    assert kernel_reason(*tensors) is None


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((t(3, 16, dtype=torch.float32), t(8, 16, dtype=torch.float32)), "torch.float32.*bfloat16 and float16"),
        ((t(3, 12), t(8, 12)), "a width of 12 is not a positive multiple of 8"),
        ((t(3, 0), t(8, 0)), "a width of 0 "),
        ((t(3, 16), t(8, 16), t(12)), "a width of 12 "),
        ((t(16, 8).t(), t(8, 16)), r"shape \[8, 16\] is not contiguous in its last dimension"),
        ((t(3, 16), t(8, 32)[:, ::2]), r"shape \[8, 16\] is not contiguous"),
        ((t(3, 16), t(8, 16), t(32)[::2]), r"shape \[16\] is not contiguous"),
        ((wide(16, 20), t(8, 16)), "row stride of 20 elements is not a multiple of 16 bytes"),
        ((t(3, 16), wide(16, 21)), "row stride of 21 elements"),
        ((t(1, 16).expand(3, 16), t(8, 16)), "row stride of 0 elements lets rows of 16 overlap"),
    ],
)
def test_operands_that_the_kernels_cannot_read_have_a_reason(tensors: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert kernel_reason(*tensors) is None, kernel_reason(*tensors)
