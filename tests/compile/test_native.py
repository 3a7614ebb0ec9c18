"""Kernels of the native family, compiled by the real NVRTC: no spills."""

from __future__ import annotations

import pytest

from srelu24_gen.compile import BuildStore, build, compile_source, key_of
from srelu24_gen.errors import CompileError
from srelu24_gen.render import render
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Producer
from srelu24_gen.target import Toolchain

ELF = b"\x7fELF"

WIDE = KernelConfig(tile_m=192, producer=Producer.THREAD)
WIDE8 = KernelConfig(tile_m=192, tile_k=128, producer=Producer.THREAD)
SPECS = [
    KernelSpec(Family(Op.GEMM, DType.BF16), KernelConfig()),
    KernelSpec(Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2), WIDE),
    KernelSpec(Family(Op.SPGEMM, DType.FP16), WIDE),
    KernelSpec(Family(Op.SPARSIFY24, DType.BF16, Activation.RELU2), KernelConfig()),
    KernelSpec(
        Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, count_nonzeros=True, tokens=True, permuted=True), WIDE
    ),
    KernelSpec(Family(Op.GEMM_DRELU2_24, DType.FP16, tokens=True, permuted=True), WIDE),
    KernelSpec(Family(Op.SPGEMM_TOKENS, DType.BF16, out=DType.FP32, accumulate=True, transposed=True), WIDE),
    *(
        KernelSpec(Family(Op.GEMM_RELU2_24, DType.E4M3, Activation.RELU2, out=out), WIDE8)
        for out in (DType.E4M3, DType.BF16)
    ),
    KernelSpec(Family(Op.SPGEMM, DType.E4M3, out=DType.BF16), WIDE8),
    KernelSpec(
        Family(Op.SPGEMM, DType.E4M3, bias=True, residual=True, out=DType.FP16, weight=DType.E5M2),
        KernelConfig(tile_k=128),
    ),
    *(
        KernelSpec(
            Family(op, DType.E4M3, activation, out=DType.BF16, promote=True), KernelConfig(tile_n=128, tile_k=128)
        )
        for op, activation in ((Op.GEMM_RELU2_24, Activation.RELU2), (Op.SPGEMM, Activation.NONE))
    ),
    KernelSpec(Family(Op.QUANTIZE_ROWS, DType.FP16, out=DType.E4M3), KernelConfig()),
    KernelSpec(Family(Op.SQUARE_ROWS, DType.BF16, out=DType.E4M3), KernelConfig()),
    *(KernelSpec(Family(op, DType.BF16), KernelConfig()) for op in (Op.TRANSPOSE, Op.DENSE_COLUMNS)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_kernel_compiles_without_spills(spec: KernelSpec, store: BuildStore) -> None:
    built = build(spec, store=store)
    assert key_of(spec) == built.meta.key
    assert built.cubin.startswith(ELF)
    assert (built.meta.spill_bytes, built.meta.stack_bytes) == (0, 0)
    assert built.meta.warnings == []
    assert built.meta.compile_seconds < 20, "a ceiling for slow machines; about 2 s is usual"
    assert render(spec).source == render(spec).source


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (KernelConfig(tile_n=96), "tile_n / cluster_m must be a multiple of the load block"),
        (KernelConfig(tile_k=32), "a k-block is 128 bytes of a row of B"),
        (KernelConfig(cluster_m=8), "warp w of a consumer tells CTA w"),
        (KernelConfig(stages=1), "the ring is deeper than what the producer leaves empty"),
    ],
)
def test_a_header_says_what_is_wrong_with_a_configuration(
    config: KernelConfig, words: str, toolchain: Toolchain
) -> None:
    spec = KernelSpec(Family(Op.GEMM, DType.BF16), config)
    with pytest.raises(CompileError) as caught:
        compile_source(render(spec).source, spec.name, toolchain=toolchain)
    assert words in caught.value.log
