"""What the host tells the training kernels, walked as they walk it, and the packed form along tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from srelu24.numerics import reference
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.arguments import Arguments, TokenArguments
from srelu24.training import kernels
from srelu24.training.order import token_order
from srelu24.training.packed import TokenSparse24
from srelu24_gen import space
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op
from srelu24_gen.target import TARGETS
from stubbed_gpu import loaded_kernel

TILE_ROWS = sorted({m for m, _ in space.tiles(TARGETS["h200"])})

CPU = torch.device("cpu")
M, N = 208, 256


@dataclass(frozen=True)
class Box:
    """A tensor map."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def load(self, *start: int) -> list[int | None]:
        """Offsets, in elements, of what lands one after the other in shared memory; None is zero."""
        offsets: list[int | None] = []
        strides = (1, *self.strides)
        for at in itertools.product(*(range(size) for size in reversed(self.box))):
            index = [s + i for s, i in zip(start, reversed(at), strict=True)]
            inside = all(i < size for i, size in zip(index, self.dims, strict=True))
            offsets.append(sum(i * s for i, s in zip(index, strides, strict=True)) if inside else None)
        return offsets


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(
        dtype: DType, address: int, *, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], **_: int
    ) -> Box:
        assert all(0 < size <= 256 for size in box)
        assert all(stride * dtype.bytes % 16 == 0 for stride in strides)
        assert box[0] * dtype.bytes == 128
        return Box(dims, strides, box)

    monkeypatch.setattr(kernels, "tensor_map", record)


def launcher(family: Family, **config: int) -> kernels.TrainingLauncher:
    spec = KernelSpec(family, KernelConfig(**config))  # type: ignore[arg-type]
    return kernels.TrainingLauncher(spec, loaded_kernel())


def arguments(m: int, n: int, k: int, *, a: int, b: int, stride: int | None, tokens: int) -> Arguments:
    zeros = dict.fromkeys(Arguments._fields, 0)
    known = {"m": m, "n": n, "k": k, "a_stride": a, "b_stride": b}
    steps = kernels.row_steps(tokens, stride)
    return Arguments(**{**zeros, **known, "scales": None, "tokens": TokenArguments(*(0,) * 6, *steps)})  # type: ignore[arg-type]


def token_of_row(m: int, stride: int | None) -> list[int]:
    """From the order of positions: position p of a block is row p // 2 + 8 (p % 2)."""
    order = token_order(m, stride, CPU).tolist()
    rows = [0] * len(order)
    for p, token in enumerate(order):
        rows[p // 16 * 16 + p % 16 // 2 + 8 * (p % 2)] = token
    return rows


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("m", [16, M, 1040])
def test_steps_are_the_order_of_the_rows(m: int, stride: int | None) -> None:
    row_step, block_step = kernels.row_steps(m, stride)
    assert [r % 16 * row_step + r // 16 * block_step for r in range(m)] == token_of_row(m, stride)


def test_other_strides_are_refused() -> None:
    assert kernels.row_steps(160, 10) == kernels.row_steps(160, None)
    for stride in (0, 2, 160):
        with pytest.raises(Unsupported, match=f"token_stride is {stride}; the kernels take 1 and the widest"):
            kernels.row_steps(160, stride)


@pytest.mark.usefixtures("boxes")
@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("tile_m", TILE_ROWS)
def test_dense_rows_are_loaded_in_their_order(tile_m: int, stride: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(Op.GEMM_DRELU2_24, DType.BF16, tokens=True, permuted=True)
    made = launcher(family, tile_m=tile_m)
    monkeypatch.setattr(kernels.GemmLauncher, "_encode_maps_of_b", lambda *_: (None,) * 3)
    box, *_ = made._encode_maps(arguments(M, N, 128, a=136, b=0, stride=stride, tokens=M))
    assert isinstance(box, Box)
    tokens = token_of_row(M, stride)
    for row in range(0, M, tile_m):
        expected = [tokens[row + r] * 136 + 64 + k if row + r < M else None for r in range(tile_m) for k in range(64)]
        assert box.load(64, 0, row // 16) == expected


@pytest.mark.usefixtures("boxes")
@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize(("tile_m", "cluster_m"), [(64, 1), (128, 2), (192, 2)])
def test_operands_along_tokens_are_loaded_by_position(tile_m: int, cluster_m: int, stride: int | None) -> None:
    made = launcher(Family(Op.SPGEMM_TOKENS, DType.BF16), tile_m=tile_m, cluster_m=cluster_m)
    features, columns, *_ = made._encode_maps(arguments(192, N, M, a=192, b=264, stride=stride, tokens=M))
    assert isinstance(features, Box)
    assert isinstance(columns, Box)
    order = token_order(M, stride, CPU).tolist()
    for k in range(0, M, 64):
        for first in range(0, 192, tile_m):  # as tile_load_tokens.cuh asks for it
            expected = [
                kc * 192 + f + i if kc < M // 2 and f < 192 else None
                for f in range(first, first + tile_m, 64)
                for kc in range(k // 2, k // 2 + 32)
                for i in range(64)
            ]
            assert features.load(0, k // 2, first // 64) == expected
        share = 256 // cluster_m
        for first in range(0, N, share):
            expected = [
                order[p] * 264 + c + i if p < M else None
                for c in range(first, first + share, 64)
                for p in range(k, k + 64)
                for i in range(64)
            ]
            assert columns.load(0, 0, 0, k // 16, first // 64) == expected


def packed_along_features(m: int, f: int) -> Sparse24:
    return Sparse24.empty(m, f, torch.bfloat16, CPU)


def test_every_tensor_of_a_launch_has_its_place_in_the_arguments() -> None:
    m, d, f = 208, 64, 128
    x, g = (torch.empty(m, d, dtype=torch.bfloat16) for _ in range(2))
    w1, w2 = torch.empty(f, d + 8, dtype=torch.bfloat16)[:, :d], torch.empty(d, f, dtype=torch.bfloat16)
    s, dy1 = packed_along_features(m, f), packed_along_features(m, f)
    along = TokenSparse24.empty(m, f, torch.bfloat16, CPU)
    bias, counts = torch.empty(f, dtype=torch.bfloat16), torch.empty(f, dtype=torch.int32)
    steps = kernels.row_steps(m, None)
    nothing = dict.fromkeys(("metadata", "out_metadata", "bias", "residual", "counts", "partials", "flags"), 0)
    nothing["residual_stride"] = 0

    operands = kernels.TrainingOperands

    def given(o: kernels.TrainingOperands) -> dict[str, object]:
        return {name: value for name, value in kernels._arguments_of(o)._asdict().items() if name != "scales"}

    tokens = (along.values.data_ptr(), along.metadata.data_ptr())
    assert given(
        operands(a=x, b=w1, out=s, token_stride=None, bias=bias, counts=counts, along_tokens=along)
    ) == nothing | {
        "a": x.data_ptr(),
        "b": w1.data_ptr(),
        "out": s.values.data_ptr(),
        "out_metadata": s.metadata.data_ptr(),
        "bias": bias.data_ptr(),
        "counts": counts.data_ptr(),
        **{"m": m, "n": f, "k": d, "a_stride": d, "b_stride": d + 8, "out_stride": s.values.stride(0)},
        "tokens": (*tokens, 0, 0, f, 0, *steps),
    }
    shared = Sparse24(dy1.values, s.metadata, s.shape)
    assert given(operands(a=g, b=w1, out=shared, token_stride=None, along_tokens=along, saved=s)) == nothing | {
        "a": g.data_ptr(),
        "b": w1.data_ptr(),
        "out": dy1.values.data_ptr(),
        **{"m": m, "n": f, "k": d, "a_stride": d, "b_stride": d + 8, "out_stride": dy1.values.stride(0)},
        "tokens": (*tokens, s.values.data_ptr(), s.metadata.data_ptr(), f, s.values.stride(0), *steps),
    }
    y = torch.empty(m, d, dtype=torch.bfloat16)
    assert given(operands(a=s, b=w2, out=y, token_stride=1)) == nothing | {
        "a": s.values.data_ptr(),
        "metadata": s.metadata.data_ptr(),
        "b": w2.data_ptr(),
        "out": y.data_ptr(),
        **{"m": m, "n": d, "k": f, "a_stride": s.values.stride(0), "b_stride": f, "out_stride": d},
        "tokens": (0, 0, 0, 0, 0, 0, *kernels.row_steps(m, 1)),
    }
    gradient = torch.empty(d, f)
    assert given(operands(a=along, b=g, out=gradient, token_stride=None)) == nothing | {
        "a": along.values.data_ptr(),
        "metadata": along.metadata.data_ptr(),
        "b": g.data_ptr(),
        "out": gradient.data_ptr(),
        **{"m": f, "n": d, "k": m, "a_stride": f, "b_stride": d, "out_stride": f},
        "tokens": (0, 0, 0, 0, 0, 0, *steps),
    }


@pytest.mark.parametrize("accumulate", [False, True])
def test_without_tokens_nothing_is_launched(accumulate: bool) -> None:
    along, x = TokenSparse24.empty(0, 64, torch.bfloat16, CPU), torch.empty(0, 64, dtype=torch.bfloat16)
    out = torch.ones(64, 64) if accumulate else None
    found = kernels.weight_gradient(along, x, None, out=out)
    assert (found == (1 if accumulate else 0)).all()


def test_the_packed_form_along_tokens_is_that_of_the_transpose() -> None:
    x = torch.randn(M, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = reference.sparsify24(x.T.contiguous(), Activation.NONE)
    along = TokenSparse24.of_transposed(packed, M)
    assert along.values.shape == (M // 2, 64)
    assert along.values.is_contiguous()
    back = along.transposed()
    assert torch.equal(back.values, packed.values)
    assert torch.equal(back.metadata, packed.metadata)
    dense = along.to_dense()
    kept = dense != 0
    assert torch.equal(dense[kept], x[kept])
    assert (kept.view(-1, 4, 64).sum(dim=1) == 2).all()
    room = TokenSparse24.empty(M, 64, torch.bfloat16, CPU)
    assert (room.values.shape, room.metadata.shape) == (along.values.shape, along.metadata.shape)
    with pytest.raises(Unsupported, match="F = 72 is packed along tokens; a positive multiple of 64"):
        TokenSparse24.empty(M, 72, torch.bfloat16, CPU)
