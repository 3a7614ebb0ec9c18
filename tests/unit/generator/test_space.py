"""The kernel space: every rule refuses with its reason, candidates are valid, the default comes first."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srelu24_gen import cost, space, space_sm90
from srelu24_gen.bindings import footprint
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, Op, Problem, Producer
from srelu24_gen.target import TARGETS, GpuTarget

H200 = TARGETS["h200"]
RELU2 = Activation.RELU2
FUSED, SPARSE = Family(Op.GEMM_RELU2_24, DType.BF16, RELU2), Family(Op.SPGEMM, DType.BF16)
DENSE, PRUNE = Family(Op.GEMM, DType.BF16), Family(Op.SPARSIFY24, DType.BF16)
RESIDUAL = Family(Op.SPGEMM, DType.BF16, residual=True)
GRADIENT = Family(Op.GEMM_DRELU2_24, DType.BF16, tokens=True, permuted=True)
WEIGHTS = Family(Op.SPGEMM_TOKENS, DType.BF16)
THREAD = Producer.THREAD


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem(DENSE, -1, 8, 8), "-1x8x8 must be positive"),
        (Problem(DENSE, 1, 0, 8), "1x0x8 must be positive"),
        (Problem(DENSE, 1, 8, 0), "1x8x0 must be positive"),
        (Problem(DENSE, 2**31, 8, 8), "M = 2147483648 is above .* split the problem along M"),
        (Problem(DENSE, 1, 2**31, 8), "N = 2147483648 is above"),
        (Problem(DENSE, 1, 8, 2**31), "K = 2147483648 is above"),
        (Problem(SPARSE, 1, 12, 8), "N = 12 is not a multiple of 8"),
        (Problem(SPARSE, 1, 8, 12), "K = 12 is not a multiple of 8"),
        (Problem(dataclasses.replace(FUSED, activation=Activation.NONE), 1, 8, 8), "must be relu2"),
        (Problem(dataclasses.replace(SPARSE, activation=RELU2), 1, 8, 8), "spgemm has no activation"),
        (Problem(dataclasses.replace(DENSE, count_nonzeros=True), 1, 8, 8), "only GEMMs that prune count .*, not gemm"),
        (Problem(dataclasses.replace(FUSED, residual=True), 1, 8, 8), "only spgemm adds a residual"),
        (Problem(dataclasses.replace(PRUNE, bias=True), 1, 8), "sparsify24 takes no bias"),
        (Problem(dataclasses.replace(DENSE, tokens=True), 16, 64, 64), "only GEMMs with a packed output pack along"),
        (Problem(dataclasses.replace(PRUNE, permuted=True), 16, 64), "sparsify24 has no rows to permute"),
        (Problem(dataclasses.replace(RESIDUAL, permuted=True), 16, 64, 64), "spgemm with a residual has no rows"),
        (Problem(dataclasses.replace(DENSE, transposed=True), 16, 64, 64), "only spgemm_tokens has an output"),
        (Problem(dataclasses.replace(GRADIENT, tokens=False), 16, 64, 64), "always packs along tokens"),
        (Problem(dataclasses.replace(GRADIENT, bias=True), 16, 64, 64), "gemm_drelu2_24 takes no bias"),
        (Problem(dataclasses.replace(WEIGHTS, activation=RELU2), 64, 64, 16), "spgemm_tokens has no activation"),
        (
            Problem(dataclasses.replace(WEIGHTS, out=DType.FP16), 64, 64, 16),
            "result of spgemm_tokens on bf16 is of its",
        ),
        (Problem(GRADIENT, 24, 64, 64), "24 tokens are not a multiple of 16; pad the batch"),
        (Problem(WEIGHTS, 64, 64, 24), "24 tokens are not a multiple of 16"),
        (Problem(WEIGHTS, 72, 64, 16), "a width of 72 is not a multiple of 64"),
        (Problem(GRADIENT, 16, 64, 72), "a width of 72 is not a multiple of 64"),
    ],
)
def test_problems_are_refused_with_the_reason(problem: Problem, words: str) -> None:
    verdict = space.supports_problem(problem, H200)
    assert not verdict.ok
    assert space.supports(problem, KernelConfig(), H200) == verdict
    for refuse in (space.default, space.candidates):
        with pytest.raises(Unsupported, match=words):
            refuse(problem, H200)


def test_another_architecture_is_refused() -> None:
    blackwell = GpuTarget("b200", "NVIDIA B200", arch="sm_100a")
    verdict = space.supports(Problem(DENSE, 8, 8, 8), KernelConfig(), blackwell)
    reason = "NVIDIA B200: no kernels are made for sm_100a; native ones for sm_90a, portable ones for sm_80 and later"
    assert verdict == space.Verdict(False, reason)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        (DENSE, KernelConfig(tile_m=96), "a tile of 96x256 is not one of 64x128"),
        (DENSE, KernelConfig(tile_m=256), "a tile of 256x256 is not one of"),
        (DENSE, KernelConfig(tile_n=64), "a tile of 128x64 is not one of"),
        (FUSED, KernelConfig(tile_n=128), "needs tile_n = 256"),
        (DENSE, KernelConfig(tile_k=128), "tile_k = 128 is not 64"),
        (DENSE, KernelConfig(cluster_m=4), "cluster_m = 4 is not 1 or 2"),
        (DENSE, KernelConfig(raster_group=0), "raster_group = 0 must be at least 1"),
        (DENSE, KernelConfig(tile_m=192), "512 threads leave 128 registers each; tile_n = 256 needs about 160"),
        (DENSE, KernelConfig(stages=1), "stages = 1; a warpgroup producer needs at least 2"),
        (DENSE, KernelConfig(stages=2, producer=THREAD), "stages = 2; a thread producer needs at least 3"),
        (DENSE, KernelConfig(stages=5), "5 stages need 246784 bytes of shared memory; 232448 there"),
        (PRUNE, KernelConfig(stages=2), "sparsify24 has only the default config"),
    ],
)
def test_configs_are_refused_with_the_reason(family: Family, config: KernelConfig, words: str) -> None:
    verdict = space.supports_config(family, config, H200)
    assert not verdict.ok
    assert words in verdict.reason
    problem = Problem(family, 256, 256, 0 if family.op is Op.SPARSIFY24 else 256)
    assert space.supports(problem, config, H200) == verdict


@pytest.mark.parametrize(
    ("family", "n", "ok"), [(FUSED, 96, False), (FUSED, 64, True), (DENSE, 96, True), (DENSE, 8, False)]
)
def test_a_producer_thread_needs_whole_blocks_of_b(family: Family, n: int, ok: bool) -> None:
    verdict = space.supports(Problem(family, 64, n, 64), KernelConfig(producer=THREAD), H200)
    assert verdict.ok == ok
    assert ok or f"N = {n} is not a multiple of" in verdict.reason
    assert space.supports(Problem(family, 64, n, 64), KernelConfig(), H200).ok


FLAGS, TYPES = (False, True), (None, *DType)
every_family = itertools.starmap(
    Family, itertools.product(Op, DType, Activation, FLAGS, FLAGS, (False,), TYPES, TYPES, FLAGS)
)
families = st.sampled_from([f for f in every_family if space.supports_family(f).ok and not space.trains(f)])
widths = st.integers(1, 2000).map(lambda w: 16 * w)
targets = st.sampled_from([TARGETS[key] for key in ("h200", "h100-pcie")])


@given(families, st.integers(0, 100_000), widths, widths, targets)
def test_candidates_are_valid_distinct_and_start_with_the_default(
    family: Family, m: int, n: int, k: int, target: GpuTarget
) -> None:
    problem = Problem(family, m, n, k if family.op.multiplies else 0)
    found = space.candidates(problem, target)
    assert found[0] == space.default(problem, target)
    assert len(set(found)) == len(found)
    assert all(space.supports(problem, config, target).ok for config in found)
    if not family.op.multiplies:
        assert found == [KernelConfig()]
    else:
        assert len(found) > 1
        assert {config.tile_k * family.dtype.bytes for config in found} == {128}


def test_large_problems_try_several_rasters_and_small_ones_small_tiles() -> None:
    large, small = (space.candidates(Problem(DENSE, m, 4096, 4096), H200) for m in (16384, 512))
    assert len({config.raster_group for config in large}) > 1
    assert min(config.tile_m * config.tile_n for config in large) == 128 * 256
    assert min(config.tile_m * config.tile_n for config in small) == 64 * 128


@given(st.sampled_from([DENSE, FUSED, SPARSE]), st.sampled_from(space.tiles(H200)), st.sampled_from(Producer))
def test_the_deepest_ring_is_the_deepest(family: Family, tile: tuple[int, int], producer: Producer) -> None:
    config = KernelConfig(*tile, producer=producer)
    deepest = space.max_stages(family, config, H200)

    def shared(stages: int) -> int:
        return footprint(family, dataclasses.replace(config, stages=stages)).shared_bytes

    assert shared(deepest) <= H200.smem_per_block
    assert deepest == 8 or shared(deepest + 1) > H200.smem_per_block


@pytest.mark.parametrize("family", [DENSE, FUSED, SPARSE], ids=lambda family: family.name)
def test_defaults(family: Family) -> None:
    # Whatever the size: the tile that is fast everywhere, and a second CTA only where it has rows.
    for m, n in ((16384, 16384), (300, 24), (129, 1864)):
        config = space.default(Problem(family, m, n, 4096), H200)
        assert (config.tile_m, config.cluster_m, config.producer) == (128, 2, Producer.WARPGROUP)
    # 64 and 62 of 66 clusters have a tile; 128 tiles are 1.94 waves; 72 are 1.09, whose second wave is split.
    for m, n, split in ((16384, 256, False), (31 * 256, 512, False), (4096, 2048, False), (3072, 1536, True)):
        assert space.default(Problem(family, m, n, 4096), H200).stream_k == split
        assert not space.default(Problem(family, m, n, 64), H200).stream_k  # little to save
    assert space.default(Problem(family, 128, 256, 64), H200).cluster_m == 1
    assert space.default(Problem(family, 0, 256, 64), H200) in space.candidates(Problem(family, 0, 256, 64), H200)


# ---------------------------------------------------------------------------------------------- 8-bit families

E4M3 = DType.E4M3
SPARSE8 = Family(Op.SPGEMM, E4M3, out=DType.BF16)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (Family(Op.SPGEMM, E4M3), "the result of spgemm on e4m3 is bf16 or fp16, not of its own type"),
        (Family(Op.SPGEMM, E4M3, out=E4M3), "bf16 or fp16, not e4m3"),
        (Family(Op.GEMM_RELU2_24, E4M3, Activation.RELU2, out=DType.FP16), "is bf16 or e4m3, not fp16"),
        (Family(Op.SPGEMM, DType.E5M2, out=DType.BF16), "spgemm does not take e5m2"),
        (Family(Op.SPGEMM, E4M3, out=DType.BF16, weight=DType.BF16), "a weight beside e4m3 is e4m3 or e5m2"),
        (Family(Op.SPGEMM, DType.BF16, out=DType.FP16), "of its own type, not fp16"),
        (Family(Op.SPGEMM, DType.BF16, promote=True), "no promoted sums"),
        (Family(Op.QUANTIZE_ROWS, E4M3, out=E4M3), "quantize_rows does not take e4m3"),
        (Family(Op.SPARSIFY24, E4M3), "sparsify24 does not take e4m3"),
        (
            Family(Op.GEMM_RELU2_24, E4M3, Activation.RELU2, count_nonzeros=True, out=E4M3),
            "does not count non-zeros",
        ),
    ],
)
def test_types_that_do_not_go_together(family: Family, words: str) -> None:
    verdict = space.supports_family(family)
    assert not verdict.ok
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        (SPARSE8, KernelConfig(), "tile_k = 64 is not 128, the 128-byte swizzle span of e4m3 B"),
        (
            dataclasses.replace(SPARSE8, promote=True),
            KernelConfig(tile_k=128),
            "with promoted sums, which take twice the accumulators, it needs about 280",
        ),
        (
            dataclasses.replace(SPARSE8, residual=True),
            KernelConfig(tile_m=192, tile_k=128, producer=THREAD),
            "with a residual to load it needs about 176",
        ),
    ],
)
def test_8_bit_configs_are_refused_with_the_reason(family: Family, config: KernelConfig, words: str) -> None:
    verdict = space.supports_config(family, config, H200)
    assert not verdict.ok
    assert words in verdict.reason


def test_8_bit_widths_are_multiples_of_16() -> None:
    assert space.supports_problem(Problem(SPARSE8, 5, 48, 272), H200).ok
    for n, k in ((40, 272), (48, 264)):
        assert "is not a multiple of 16" in space.supports_problem(Problem(SPARSE8, 5, n, k), H200).reason


# ---- tiles that somebody adds


def with_tiles(monkeypatch: pytest.MonkeyPatch, *added: tuple[int, int]) -> None:
    monkeypatch.setattr(space_sm90, "TILES", (*space_sm90.TILES, *(space_sm90.Tile(m, n) for m, n in added)))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (DENSE, KernelConfig(tile_n=96, cluster_m=2, stages=3)),
        (WEIGHTS, KernelConfig(tile_n=192, cluster_m=2, stages=3)),
        (DENSE, KernelConfig(tile_n=80, cluster_m=1, stages=3)),
    ],
)
def test_what_a_cta_loads_of_a_new_tile_is_whole_blocks(
    family: Family, config: KernelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TMA box of fewer rows than the barrier expects bytes for would wait for ever."""
    with_tiles(monkeypatch, (config.tile_m, config.tile_n))
    verdict = space.supports_config(family, config, H200)
    assert not verdict.ok
    assert "no multiple of" in verdict.reason
    whole = dataclasses.replace(config, tile_n=192, cluster_m=1)
    with_tiles(monkeypatch, (128, 192))
    assert space.supports_config(family, whole, H200).ok


@pytest.mark.parametrize(
    ("family", "tile", "config"),
    [  # what ptxas spilled: 28, 236 and 1860 bytes
        (RESIDUAL, (192, 256), KernelConfig(tile_m=192, producer=THREAD, stream_k=True)),
        (SPARSE, (256, 192), KernelConfig(tile_m=256, tile_n=192, cluster_m=1, producer=THREAD)),
        (SPARSE, (256, 192), KernelConfig(tile_m=256, tile_n=192, cluster_m=2, producer=THREAD)),
        (
            Family(Op.GEMM, DType.E4M3, out=DType.BF16, promote=True),
            (256, 128),
            KernelConfig(tile_m=256, tile_n=128, tile_k=128),
        ),
    ],
)
def test_a_new_tile_changes_no_other_and_what_would_spill_is_refused(
    family: Family, tile: tuple[int, int], config: KernelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(family, 4096, 4096, 4096)
    old = {(each.m, each.n) for each in space_sm90.TILES}
    before = space.candidates(problem, H200)
    with_tiles(monkeypatch, (256, 128), (256, 192), (256, 256), (192, 192))
    assert tile in [(each.m, each.n) for each in space_sm90.TILES]
    verdict = space.supports_config(family, dataclasses.replace(config, stages=3), H200)
    assert not verdict.ok
    assert "registers" in verdict.reason
    after = space.candidates(problem, H200)
    assert [each for each in after if (each.tile_m, each.tile_n) in old] == before


def test_a_tile_that_nobody_timed_is_tried_and_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tiles(monkeypatch, (256, 128), (192, 192))
    cost._ranked.cache_clear()
    try:
        ranked = [
            (problem, cost.rank(problem, H200), cost.best(problem, H200))
            for problem in (Problem(DENSE, m, n, 4096) for m in (512, 1024, 3072, 8192) for n in (2048, 4096, 6144))
        ]
    finally:
        cost._ranked.cache_clear()
    new = {(256, 128), (192, 192)}
    assert any((first.tile_m, first.tile_n) in new for _, (first, *_), _ in ranked), "the model likes none: try others"
    for _, candidates, best in ranked:
        assert new & {(each.tile_m, each.tile_n) for each in candidates}, "the tuner has it to try"
        assert (best.tile_m, best.tile_n) not in new
