"""The mma.sync kernels compile for every architecture they are meant for, without a GPU: registers, spills, layout."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from srelu24.runtime.arguments import Arguments, encode_mma_sync
from srelu24_gen import space
from srelu24_gen.compile import BuildStore, build, build_rendered
from srelu24_gen.render import RenderedKernel
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, Producer
from srelu24_gen.target import TARGETS, GpuTarget

FAMILIES = (
    Family(Op.GEMM, DType.FP16, Activation.RELU2, bias=True),
    Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, bias=True, count_nonzeros=True),
    Family(Op.SPGEMM, DType.BF16, bias=True, residual=True),
    Family(Op.SPARSIFY24, DType.BF16, Activation.RELU2),
)
FP8_FAMILIES = (
    Family(Op.GEMM, DType.E4M3, out=DType.FP16),
    Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, bias=True, out=DType.E4M3),
    Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, out=DType.BF16),
    Family(Op.SPGEMM, DType.E4M3, bias=True, residual=True, out=DType.BF16, weight=DType.E5M2),
    Family(Op.QUANTIZE_ROWS, DType.BF16, out=DType.E4M3),
    Family(Op.SQUARE_ROWS, DType.BF16, out=DType.E4M3),
)
BY_ARCH = {target.portable.arch: target.portable for target in TARGETS.values()}
"""A GPU of every architecture; Hopper's as sm_90."""


def default_spec(family: Family, target: GpuTarget) -> KernelSpec:
    problem = Problem(family, 4096, 4096, 4096 if family.op.multiplies else 0)
    return KernelSpec(family, space.default(problem, target), target.arch)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("arch", sorted(BY_ARCH))
def test_every_default_compiles_without_a_spill(
    arch: str, family: Family, store: BuildStore, record_property: Callable[[str, object], None]
) -> None:
    meta = build(default_spec(family, BY_ARCH[arch]), store=store).meta
    record_property("registers", meta.registers)
    print(f"{meta.name}: {meta.registers} registers, {meta.spill_bytes} bytes spilled")
    assert (meta.arch, meta.warnings) == (arch, [])
    assert (meta.spill_bytes, meta.stack_bytes) == (0, 0)


@pytest.mark.parametrize("family", FP8_FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_120"])
def test_every_8_bit_default_compiles(arch: str, family: Family, store: BuildStore) -> None:
    meta = build(default_spec(family, BY_ARCH[arch]), store=store).meta
    print(f"{meta.name}: {meta.registers} registers, {meta.spill_bytes} bytes spilled")
    assert (meta.arch, meta.warnings) == (arch, [])
    if arch != "sm_90":  # Hopper has no such instruction: ptxas makes 16-bit ones of it, and is short of registers
        assert (meta.spill_bytes, meta.stack_bytes) == (0, 0)


def test_the_parameter_block_is_as_long_as_its_struct(
    rendered: Callable[..., RenderedKernel], store: BuildStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[bytes] = []
    monkeypatch.setattr("srelu24.runtime.arguments.ArgumentBlock", packed.append)
    config = KernelConfig(128, 128, 64, cluster_m=1, stages=3, producer=Producer.ALL, raster_group=3)
    spec = KernelSpec(FAMILIES[1], config, "sm_80")
    numbers = dict.fromkeys(Arguments._fields, 1) | {"m": 300, "n": 264, "k": 72, "scales": None, "tokens": None}
    _, grid = encode_mma_sync(spec, Arguments(**numbers), sm_count=108)  # type: ignore[arg-type]
    assert grid == 3 * 4, "three tiles of rows; four of columns, since E goes on to 512"
    (content,) = packed
    assert struct.unpack_from("<4i", content, 8 * 12) == (300, 264, 72, 2)
    source = (
        "#include <srelu24/sm80/params.cuh>\n"
        f"static_assert(sizeof(srelu24::GemmParams) == {-(-len(content) // 8) * 8});\n"
        'extern "C" __global__ void srelu24_kernel(float* p) { p[threadIdx.x] = p[threadIdx.x + 32]; }\n'
    )
    assert build_rendered(rendered(source), store=store).cubin
