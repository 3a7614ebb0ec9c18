"""The space of the mma.sync kernels: rules refuse with a reason, candidates fit every GPU, defaults are sane."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srelu24_gen import space
from srelu24_gen.bindings import footprint, names_for, template_for, warp_rows
from srelu24_gen.spec import (
    Activation,
    DType,
    Family,
    Instructions,
    KernelConfig,
    KernelSpec,
    Op,
    Problem,
    Producer,
    instructions_of,
)
from srelu24_gen.target import TARGETS, GpuTarget

A100, L40S = TARGETS["a100"], TARGETS["l40s"]
PORTABLE = [target.portable for target in TARGETS.values()]
DENSE, SPARSE = Family(Op.GEMM, DType.BF16), Family(Op.SPGEMM, DType.FP16, bias=True, residual=True)
FP8 = Family(Op.SPGEMM, DType.E4M3, out=DType.BF16)
FUSED = Family(Op.GEMM_RELU2_24, DType.BF16, Activation.RELU2, bias=True, count_nonzeros=True)
BASE = KernelConfig(128, 128, 64, cluster_m=1, stages=3, producer=Producer.ALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"producer": Producer.THREAD}, "load with all threads; producer is thread, not all"),
        ({"tile_m": 192}, "a tile of 192x128 is not one of 128x256, 256x128"),
        ({"tile_k": 32}, "tile_k = 32 is not 64, 128 bytes of a row"),
        ({"cluster_m": 2}, "have no clusters, it must be 1"),
        ({"raster_group": 0}, "raster_group = 0 must be at least 1"),
        ({"stages": 1}, "stages = 1; loads are ahead"),
        ({"stages": 4}, "4 stages need 131072 bytes of shared memory; 101376 there"),
    ],
)
def test_configs_are_refused_with_the_reason(change: dict[str, object], words: str) -> None:
    assert space.supports_config(DENSE, BASE, L40S).ok
    verdict = space.supports_config(DENSE, dataclasses.replace(BASE, **change), L40S)  # type: ignore[arg-type]
    assert not verdict.ok
    assert words in verdict.reason


def test_a_configuration_of_the_other_family_is_refused() -> None:
    native = space.supports_config(DENSE, BASE, TARGETS["h200"])
    assert native.reason == "the wgmma kernels have one producer, warpgroup or thread, not all"
    assert "producer is warpgroup, not all" in space.supports_config(DENSE, KernelConfig(), A100).reason


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (FP8, "sm_80 has no mma.sync of 8-bit floats; sm_89, sm_90, sm_120, sm_121 have"),
        (Family(Op.QUANTIZE_ROWS, DType.BF16, out=DType.E4M3), "sm_80 has no mma.sync of 8-bit floats"),
        (dataclasses.replace(FP8, promote=True), "no registers for promoted sums"),
        (Family(Op.SPGEMM_TOKENS, DType.BF16), "training step are wgmma kernels"),
    ],
)
def test_families_without_a_portable_kernel(family: Family, words: str) -> None:
    verdict = space.supports_problem(Problem(family, 64, 64, 64 if family.op.multiplies else 0), A100)
    assert not verdict.ok
    assert words in verdict.reason
    assert space.has_kernel(family, TARGETS["h100"]).ok


def test_8_bits_are_for_architectures_that_have_them() -> None:
    have = {target.arch for target in PORTABLE if space.has_kernel(FP8, target).ok}
    assert have == {"sm_89", "sm_90", "sm_120"}
    config = space.default(Problem(FP8, 4096, 4096, 4096), L40S)
    assert (config.tile_m, config.tile_n, config.tile_k, config.stages) == (256, 128, 128, 3)
    names = names_for(KernelSpec(dataclasses.replace(FP8, weight=DType.E5M2), config, "sm_89"))
    assert (names["element"], names["weight"], names["mma_k"]) == ("cutlass::float_e4m3_t", "cutlass::float_e5m2_t", 64)
    dense = names_for(KernelSpec(Family(Op.GEMM, DType.E4M3, out=DType.BF16), config, "sm_89"))
    assert dense["mma"] == "SM89_16x8x32_F32E4M3E4M3F32_TN"


@given(
    st.sampled_from([DENSE, SPARSE, FUSED]),
    st.integers(0, 100_000),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from(PORTABLE),
)
def test_candidates_fit_every_gpu_and_take_every_width(
    family: Family, m: int, n: int, k: int, target: GpuTarget
) -> None:
    problem = Problem(family, m, 8 * n, 8 * k)
    found = space.candidates(problem, target)
    assert found[0] == space.default(problem, target)
    assert len(set(found)) == len(found) > 5
    for config in found:
        size = footprint(family, config)
        assert size.shared_bytes <= target.smem_per_block
        assert size.threads in (128, 256)
        assert size.threads * size.consumer_registers <= target.registers_per_sm
        assert config.batch_invariant == (not config.stream_k)
        assert space.batch_invariant(problem, config, target) == dataclasses.replace(config, stream_k=False)


def test_defaults_follow_the_shared_memory_and_the_rows() -> None:
    def tile(target: GpuTarget, family: Family, m: int) -> tuple[int, int, int]:
        config = space.default(Problem(family, m, 4096, 4096), target)
        return config.tile_m, config.tile_n, config.stages

    assert tile(A100, DENSE, 4096) == (128, 256, 3)
    assert tile(L40S, DENSE, 4096) == (128, 128, 3)
    assert tile(L40S, DENSE, 64) == (64, 128, 4)
    assert tile(A100, SPARSE, 4096)[:2] == (128, 256)


def test_warps_cover_the_tile() -> None:
    for config in space.candidates(Problem(DENSE, 4096, 4096, 4096), A100):
        size = footprint(Family(Op.GEMM, DType.BF16), config)
        assert size.threads // 32 * warp_rows(config) * 64 == config.tile_m * config.tile_n


def test_names_and_template() -> None:
    spec = KernelSpec(SPARSE, BASE, "sm_86")
    assert spec.name == "spgemm_fp16_bias_residual_sm_86_128x128x64_c1_s3_all"
    assert template_for(spec) == "sm80/gemm.cu.jinja"
    names = names_for(spec)
    assert (names["mma"], names["sparse"], names["warp_m"]) == ("SM80_16x8x16_F32F16F16F32_TN", "true", 64)
    # 128 rows of 32 packed values and 128 of 64, 2 bytes each
    assert names["shared_bytes"] == 3 * (128 * 64 + 128 * 128)


@pytest.mark.parametrize(
    ("arch", "instructions"),
    [("sm_90a", "wgmma"), ("sm_90", "mma.sync"), ("sm_80", "mma.sync"), ("sm_120", "mma.sync")],
)
def test_the_architecture_names_the_kernel_family(arch: str, instructions: str) -> None:
    assert instructions_of(arch) is Instructions(instructions)
