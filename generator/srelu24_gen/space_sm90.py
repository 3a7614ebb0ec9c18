"""The space of the wgmma kernels: which configurations compile and fit, which are worth trying, where to start."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from srelu24_gen.bindings import (
    E_VECTOR_COLUMNS,
    K_BLOCK_BYTES,
    PACKING_OPS,
    SPARSE_OPS,
    footprint,
    load_block,
    loads_ragged_n,
    max_stages,
)
from srelu24_gen.families import Verdict
from srelu24_gen.spec import DType, Family, KernelConfig, Op, Problem, Producer
from srelu24_gen.target import GpuTarget

_TILES_M = (64, 128, 192)
_TILES_N = (128, 256)
_LEAST_SPLIT_M = 128
_ACCUMULATOR_OVERHEAD = 32
"""Registers a consumer thread needs besides its accumulators: descriptors, ring position, E."""
_DEFAULT_GROUP = 8
_RASTER_GROUPS = (2, 4, _DEFAULT_GROUP, 16)
_SPLIT_PAYS_FROM = {"dense": 16, "sparse": 26}
"""k-blocks of the last wave that stream-K has to save: there it breaks even, with what partial sums take to L2 and back
(docs/performance-log.md)."""


def supports_family(family: Family, target: GpuTarget) -> Verdict:
    """There is a kernel of every family."""
    return Verdict(True)


def supports_sizes(problem: Problem, config: KernelConfig) -> Verdict:
    """Whether the GEMM, built as ``config``, takes these sizes."""
    block = load_block(problem.family.op)
    if problem.n % block and not loads_ragged_n(config):
        return Verdict(False, f"N = {problem.n} is not a multiple of {block}, which a producer thread cannot load")
    return Verdict(True)


def supports_config(family: Family, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether the GEMM of ``family`` can be built as ``config`` for ``target``; sizes do not matter."""
    op, c = family.op, config
    if c.producer is Producer.ALL:
        return Verdict(False, f"the wgmma kernels have one producer, warpgroup or thread, not {c.producer.value}")
    if c.tile_m not in _TILES_M:
        return Verdict(False, f"tile_m = {c.tile_m} is not one of {_TILES_M}: a consumer warpgroup owns 64 rows")
    if c.tile_n not in _TILES_N:
        return Verdict(False, f"tile_n = {c.tile_n} is not one of {_TILES_N}, the MMA widths the templates bind")
    if op in PACKING_OPS and c.tile_n != E_VECTOR_COLUMNS and not family.promote:
        return Verdict(False, f"{op.value} needs tile_n = {E_VECTOR_COLUMNS}: a tile writes whole vectors of E")
    if c.tile_k != _tile_k(family):
        return Verdict(
            False, f"tile_k = {c.tile_k} is not {_tile_k(family)}, the 128-byte swizzle span of {family.dtype.value} B"
        )
    if family.promote and c.tile_n != min(_TILES_N):
        return Verdict(
            False, f"promoted sums take twice the accumulators, which fit with tile_n = {min(_TILES_N)} only"
        )
    if c.cluster_m not in (1, 2):
        return Verdict(False, f"cluster_m = {c.cluster_m} is not 1 or 2; 4 leaves multiprocessors idle")
    if c.raster_group < 1:
        return Verdict(False, f"raster_group = {c.raster_group} must be at least 1")
    size = footprint(family, c)
    needed = c.tile_n // 2 + _ACCUMULATOR_OVERHEAD  # promoted sums are no operands of a wgmma
    # A wgmma is checked against the registers every thread is launched with, before setmaxnreg.
    launched = min(255, target.registers_per_sm // size.threads // 8 * 8)
    if launched < needed:
        return Verdict(
            False, f"{size.threads} threads leave {launched} registers each; tile_n = {c.tile_n} needs about {needed}"
        )
    if c.stream_k and c.tile_m < _LEAST_SPLIT_M:
        return Verdict(
            False, f"stream_k is for tiles of {_LEAST_SPLIT_M} rows or more: {c.tile_m} leave little to split"
        )
    if c.tile_m == max(_TILES_M) and c.tile_n == max(_TILES_N):
        if family.residual:
            return Verdict(False, f"a {c.tile_m}x{c.tile_n} tile has no registers left to load a residual")
        adds = family.accumulate and family.out is not DType.FP32
        if c.stream_k and op is Op.SPGEMM_TOKENS and (adds or c.cluster_m == 1):
            return Verdict(
                False, f"a {c.tile_m}x{c.tile_n} tile has no registers left for stream_k and the store of {op.value}"
            )
    least = 2 if c.producer is Producer.WARPGROUP else 3
    if c.stages < least:
        return Verdict(False, f"stages = {c.stages}; a {c.producer.value} producer needs at least {least}")
    if size.shared_bytes > target.smem_per_block:
        return Verdict(
            False, f"{c.stages} stages need {size.shared_bytes} bytes of shared memory; {target.smem_per_block} there"
        )
    return Verdict(True)


def configs(problem: Problem, target: GpuTarget) -> Iterator[KernelConfig]:
    """What may be worth trying; not all of it is valid. The ring is always as deep as fits.

    Tiles of less than 128x256 move more bytes per FLOP; they are tried only where larger ones would leave
    multiprocessors idle, and there the raster hardly matters.
    """
    family = problem.family
    few_tiles = -(-problem.m // 128) * -(-problem.n // 256) < target.sm_count
    groups = (_DEFAULT_GROUP,) if few_tiles else _RASTER_GROUPS
    producers = (Producer.WARPGROUP, Producer.THREAD)
    for tile_m, tile_n, cluster_m, producer, stream_k in itertools.product(
        _TILES_M, _TILES_N, (2, 1), producers, (False, True)
    ):
        small = tile_m < 128 or (tile_n < max(_TILES_N) and not family.promote)
        if small and (stream_k or not few_tiles):  # stream-K fills the GPU with large tiles
            continue
        base = KernelConfig(tile_m, tile_n, _tile_k(family), cluster_m, producer=producer, stream_k=stream_k)
        base = dataclasses.replace(base, stages=max_stages(family, base, target.smem_per_block))
        for group in groups:
            yield dataclasses.replace(base, raster_group=group)


def default(problem: Problem, target: GpuTarget) -> KernelConfig:
    """A tile every kernel is at its fastest or near it with, split along K where that fills a wave that is short enough
    to pay for it. One CTA a cluster where a second would find no rows."""
    family = problem.family
    config = KernelConfig(
        tile_m=128,
        tile_n=min(_TILES_N) if family.promote else max(_TILES_N),
        tile_k=_tile_k(family),
        cluster_m=2 if problem.m > 128 else 1,
    )
    clusters = target.sm_count // config.cluster_m
    tiles = -(-problem.m // (config.tile_m * config.cluster_m)) * -(-problem.n // config.tile_n)
    saved = -tiles % clusters / clusters * -(-problem.k // config.tile_k)  # k-blocks, of every cluster
    return dataclasses.replace(
        config,
        stages=max_stages(family, config, target.smem_per_block),
        stream_k=saved >= _SPLIT_PAYS_FROM["sparse" if family.op in SPARSE_OPS else "dense"],
    )


def batch_invariant(config: KernelConfig) -> KernelConfig:
    """The batch-invariant configuration most like it; it need not be valid."""
    return dataclasses.replace(config, stream_k=False, tile_n=256)


def _tile_k(family: Family) -> int:
    return K_BLOCK_BYTES // family.dtype.bytes
