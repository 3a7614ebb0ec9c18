"""Every field of the kernels' parameter structs lies where the host packs it.

Each launcher packs numbers that differ from one another. Where a number is found in the packed bytes is where the
compiler has to have the field of its name. So a field that changes its place on one side alone does not compile here.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srelu24 import arguments, launch
from srelu24.arguments import Arguments, encode_mma_sync, fast_divmod, plan_mma_sync
from srelu24.launch import Operands, Scales
from srelu24.sparse24 import Sparse24
from srelu24.training import kernels, movers
from srelu24.training.packed import TokenSparse24
from srelu24_gen.compile import compile_source
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Producer
from srelu24_gen.target import Toolchain
from srelu24_gen.work_plan import WorkPlan, plan_work

SCALES = ("a", "b", "s_inverse", "r_largest", "saturated", "a_step", "s_inverse_step")
TOKENS = ("values", "metadata", "s", "s_metadata", "stride", "s_stride", "row_step", "block_step")
STRIDES = ("a_stride", "b_stride", "out_stride", "residual_stride")
FUSED = Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2)

Fields = dict[str, bytes]
"""What a field holds, by its name in C++. Numbers that may occur elsewhere too are looked for together with the 32-bit
fields that follow them: then the names are separated by spaces."""


def int32(value: int) -> bytes:
    return struct.pack("<i", value)


def int64(value: int) -> bytes:
    return struct.pack("<q", value)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The parameter blocks that were made."""
    blocks: list[bytes] = []

    def block(content: bytes) -> SimpleNamespace:
        blocks.append(content)
        return SimpleNamespace(address=0)

    for module in (arguments, launch, movers):
        monkeypatch.setattr(module, "ArgumentBlock", block)
    for module in (launch, movers):
        monkeypatch.setattr(module, "stream", lambda _device: 0)
    return blocks


def some_arguments(**numbers: int) -> Arguments:
    """Arguments that all differ; addresses and strides take 64 bits."""
    values: dict[str, Any] = {name: 0x70000000000 + 0x10101 * i for i, name in enumerate(Arguments._fields, start=1)}
    scales = tuple(0x51000000000 + 0x11 * i for i in range(5)), (0x5101, 0x5102)
    tokens = tuple(0x61000000000 + 0x11 * i for i in range(6)), (0x6101, 0x6102)
    return Arguments(**values | {"scales": sum(scales, ()), "tokens": sum(tokens, ())} | numbers)


def numbered(prefix: str, names: tuple[str, ...], values: tuple[int, ...], pointers_and_strides: int) -> Fields:
    return {
        prefix + name: (int64 if i < pointers_and_strides else int32)(value)
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    }


def divisors(name: str, divisor: int) -> Fields:
    """A cutlass::FastDivmod; by its divisor, which lies first."""
    return {name: fast_divmod(divisor)}


def raster(plan: WorkPlan) -> Fields:
    band, last = plan.group * plan.tiles_n, plan.tiles_m % plan.group
    return {
        "raster.tiles": int32(plan.tiles),
        "raster.tiles_n": int32(plan.tiles_n),
        "raster.group raster.full_bands": int32(plan.group) + int32(plan.tiles_m // plan.group),
        **divisors("raster.band", band),
        **divisors("raster.height", plan.group),
        **divisors("raster.last_height", last),
    }


def test_gemm_params_of_the_wgmma_kernels(
    packed: list[bytes], toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = some_arguments(m=7000, n=2312, k=5000)

    def tensor_map(_dtype: DType, address: int, box: tuple[int, ...], **_: object) -> bytes:
        kind = {2: 0xA1, 5: 0xB1}.get(len(box)) or (0xC1 if address == x.b else 0xC2)
        return bytes([kind]) * 128

    monkeypatch.setattr(launch, "tensor_map", tensor_map)
    launcher = launch.GemmLauncher.__new__(launch.GemmLauncher)
    launcher.spec, launcher.sm_count = KernelSpec(FUSED, KernelConfig(stream_k=True, raster_group=6)), 132
    launcher.encode(x)
    plan = plan_work(launcher.spec.config, x.m, x.n, x.k, launcher.sm_count)
    fields: Fields = {
        "a": b"\xa1" * 128,
        "b_share": b"\xb1" * 128,
        "b_rows[0]": b"\xc1" * 128,
        "b_rows[1]": b"\xc2" * 128,
        **{name: int64(getattr(x, name)) for name in ("metadata", "out", "out_metadata", "bias", "residual", "counts")},
        **{name: int64(getattr(x, name)) for name in ("out_stride", "residual_stride")},
        **{name: int32(getattr(x, name)) for name in ("m", "n", "k")},
        "k_blocks": int32(plan.k_blocks),
        **raster(plan),
        "split.first_tile": int32(plan.first_tile),
        "split.units": int32(plan.units),
        "split.extra": int32(plan.extra),
        **divisors("split.tile_units", plan.tile_units),
        "split.partials": int64(x.partials),
        "split.flags": int64(x.flags),
        **numbered("scale.", SCALES, x.scales, 5),
        **numbered("tokens.", TOKENS, x.tokens, 6),
    }
    check(toolchain, "sm90/params.cuh", "GemmParams", packed[0], fields, alignment=64)


def test_gemm_params_of_the_mma_sync_kernels(packed: list[bytes], toolchain: Toolchain) -> None:
    x = some_arguments(m=300, n=264, k=5000)
    config = KernelConfig(128, 128, 64, cluster_m=1, stages=3, producer=Producer.ALL, raster_group=2, stream_k=True)
    spec = KernelSpec(FUSED, config, "sm_80")
    encode_mma_sync(spec, x, sm_count=36)
    plan, slices = plan_mma_sync(spec, x.m, x.n, x.k, 36)
    units, extra = divmod(plan.tile_units, slices)
    fields: Fields = {
        **{name: int64(getattr(x, name)) for name in ("a", "b", "metadata", "out", "out_metadata", "bias", "residual")},
        **{name: int64(getattr(x, name)) for name in ("counts", *STRIDES)},
        **{name: int32(getattr(x, name)) for name in ("m", "n", "k")},
        "k_blocks": int32(plan.k_blocks),
        **raster(plan),
        **numbered("scale.", SCALES, x.scales, 5),
        **divisors("split.slices", slices),
        "split.units split.extra": int32(units) + int32(extra),
        "split.partials": int64(x.partials),
        "split.flags": int64(x.flags),
    }
    check(toolchain, "sm80/params.cuh", "GemmParams", packed[0], fields, alignment=8)


def test_the_launchers_of_a_training_step_and_of_8_bits_name_their_operands() -> None:
    """What the two tests above take as tuples."""
    given = [torch.ones(4), torch.ones(5), torch.ones(1), torch.ones(4), torch.ones(1, dtype=torch.int64)]
    s = Scales(a=given[0], b=given[1], s_inverse=given[2], r_largest=given[3], saturated=given[4])
    assert launch.scale_pointers(s) == (*(t.data_ptr() for t in given), 1, 0)

    x, w = torch.ones(64, 128).bfloat16(), torch.ones(256, 128).bfloat16()
    packed_s, along = Sparse24.empty(64, 256, x.dtype, "cpu"), TokenSparse24.empty(64, 256, x.dtype, x.device)
    dy1 = Sparse24.empty(64, 256, x.dtype, "cpu")
    o = kernels.TrainingOperands(x, w, dy1, None, along_tokens=along, saved=packed_s)
    given = [along.values, along.metadata, packed_s.values, packed_s.metadata]
    steps = kernels.row_steps(64, None)
    assert kernels._arguments(o).tokens == (*(t.data_ptr() for t in given), 256, 128, *steps)


def test_params_of_the_kernels_that_only_move_bytes(
    packed: list[bytes], toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = SimpleNamespace(device=0, launch=lambda *_: None)
    monkeypatch.setattr(movers, "_kernel", lambda *_: kernel)

    def run(launcher: type[Any], operands: Operands) -> None:
        made = launcher.__new__(launcher)
        made.kernel = kernel
        made(operands)

    def pointer(t: torch.Tensor | None) -> bytes:
        assert t is not None
        return int64(t.data_ptr())

    m, n = 320, 768
    x, y = torch.ones(m, n + 8).bfloat16()[:, :n], torch.ones(m, n + 16).bfloat16()[:, :n]
    s = Sparse24.empty(m, n, x.dtype, "cpu")
    sizes = {"m": int32(m), "n": int32(n)}

    run(launch.SparsifyLauncher, Operands(a=x, out=s))
    strides = {"in_stride": int64(n + 8), "out_stride": int64(n // 2)}
    fields = {"in": pointer(x), "out": pointer(s.values), "out_metadata": pointer(s.metadata), **strides, **sizes}
    check(toolchain, "sparsify24.cuh", "SparsifyParams", packed.pop(), fields)

    names = ("rows", "r_largest", "row_norm", "bias_largest", "s_scale", "s_inverse")
    scales = Scales(**{name: torch.ones(m) for name in names})
    run(launch.QuantizeLauncher, Operands(a=x, out=y, scales=scales))
    found = {"scale" if name == "rows" else name: pointer(getattr(scales, name)) for name in names}
    strides = {"in_stride": int64(n + 8), "out_stride": int64(n + 16)}
    check(
        toolchain,
        "quantize_rows.cuh",
        "QuantizeParams",
        packed.pop(),
        {"in": pointer(x), "out": pointer(y), **found, **strides, **sizes},
    )

    wide = n + 16  # so that rows of 16-bit and of 8-bit values are padded differently
    r, squares = (Sparse24.empty(m, wide, dtype, "cpu") for dtype in (x.dtype, torch.float8_e4m3fn))
    run(launch.SquareLauncher, Operands(a=r, out=squares, scales=scales))
    fields = {
        "in": pointer(r.values),
        "out": pointer(squares.values),
        "r_largest": pointer(scales.r_largest),
        "s_scale": pointer(scales.rows),
        "in_stride": int64(r.values.stride(0)),
        "out_stride": int64(squares.values.stride(0)),
        "m": int32(m),
        "n": int32(wide),
    }
    check(toolchain, "square_rows.cuh", "SquareParams", packed.pop(), fields)

    out = movers.transposed(x)
    strides = {"in_stride": int64(n + 8), "out_stride": int64(m)}
    fields = {"in": pointer(x), "out": pointer(out), **strides, "m n": int32(m) + int32(n)}
    check(toolchain, "sm90/params.cuh", "TransposeParams", packed.pop(), fields)

    along, columns = TokenSparse24.empty(m, n, x.dtype, x.device), torch.arange(24)
    out = movers.dense_columns(s, columns, None, along)
    fields = {
        "values": pointer(s.values),
        "metadata": pointer(s.metadata),
        "columns": pointer(columns),
        "out": pointer(out),
        "token_values": pointer(along.values),
        "stride": int64(n // 2),
        "token_stride": int64(n),
        "m n count row_step block_step": b"".join(map(int32, (m, n, 24, *kernels.row_steps(m, None)))),
    }
    check(toolchain, "sm90/params.cuh", "DenseColumnsParams", packed.pop(), fields)


def check(toolchain: Toolchain, header: str, name: str, content: bytes, fields: Fields, alignment: int = 8) -> None:
    """That the compiler has every field where its bytes are found, and that no byte belongs to none."""
    places = {field: place_of(value, content, field) for field, value in fields.items()}
    rest = bytearray(content)
    for field, value in fields.items():
        rest[places[field] : places[field] + len(value)] = bytes(len(value))
    assert not any(rest), f"{name}: bytes of no field"
    size = -(-len(content) // alignment) * alignment
    places = {one: at + 4 * i for field, at in places.items() for i, one in enumerate(field.split())}
    asserted = [
        *(f'static_assert(__INTADDR__(&((Params*)0)->{field}) == {at}, "{field}");' for field, at in places.items()),
        f'static_assert(sizeof(Params) == {size}, "the whole");',
    ]
    source = "\n".join(
        (
            f"#include <srelu24/{header}>",
            f"using Params = srelu24::{name};",
            *asserted,
            'extern "C" __global__ void srelu24_kernel(float* p) { p[0] = 0; }',
        )
    )
    compile_source(source, name, toolchain=toolchain)


def place_of(value: bytes, content: bytes, field: str) -> int:
    found = [at for at in range(0, len(content), 4) if content.startswith(value, at)]
    assert len(found) == 1, f"{field} is found at {found}"
    return found[0]
