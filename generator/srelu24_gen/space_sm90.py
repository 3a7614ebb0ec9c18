"""The space of the wgmma kernels: which configurations compile and fit, which are worth trying, where to start."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the output that a CTA computes at a time. A line here is all that a tile needs."""

    m: int
    n: int
    timed: bool = False
    """Whether the cost model has been held to times of it. Until then the tuner tries it, and nobody is served it."""


TILES = (
    Tile(64, 128, timed=True),
    Tile(64, 256, timed=True),
    Tile(128, 128, timed=True),
    Tile(128, 256, timed=True),
    Tile(192, 128, timed=True),
    Tile(192, 256, timed=True),
)
_LARGE = 128 * 256
"""Elements of a tile from which on it is tried for large problems: smaller ones move more bytes per FLOP."""
_LEAST_SPLIT_M = 128
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
    if (c.tile_m, c.tile_n) not in tiles():
        known = ", ".join(f"{m}x{n}" for m, n in tiles())
        return Verdict(False, f"a tile of {c.tile_m}x{c.tile_n} is not one of {known}")
    if op in PACKING_OPS and c.tile_n != E_VECTOR_COLUMNS and not family.promote:
        return Verdict(False, f"{op.value} needs tile_n = {E_VECTOR_COLUMNS}: a tile writes whole vectors of E")
    if c.tile_k != _tile_k(family):
        return Verdict(
            False, f"tile_k = {c.tile_k} is not {_tile_k(family)}, the 128-byte swizzle span of {family.dtype.value} B"
        )
    if c.cluster_m not in (1, 2):
        return Verdict(False, f"cluster_m = {c.cluster_m} is not 1 or 2; 4 leaves multiprocessors idle")
    if c.raster_group < 1:
        return Verdict(False, f"raster_group = {c.raster_group} must be at least 1")
    if c.tile_n // c.cluster_m % load_block(op):
        return Verdict(
            False,
            f"a CTA of a cluster of {c.cluster_m} loads {c.tile_n // c.cluster_m} of the {c.tile_n} columns of a tile, "
            f"which is no multiple of {load_block(op)}, the rows of B that {op.value} loads together",
        )
    verdict = _supports_registers(family, c, target)
    if not verdict.ok:
        return verdict
    if c.stream_k and c.tile_m < _LEAST_SPLIT_M:
        return Verdict(
            False, f"stream_k is for tiles of {_LEAST_SPLIT_M} rows or more: {c.tile_m} leave little to split"
        )
    least = 2 if c.producer is Producer.WARPGROUP else 3
    if c.stages < least:
        return Verdict(False, f"stages = {c.stages}; a {c.producer.value} producer needs at least {least}")
    size = footprint(family, c)
    if size.shared_bytes > target.smem_per_block:
        return Verdict(
            False, f"{c.stages} stages need {size.shared_bytes} bytes of shared memory; {target.smem_per_block} there"
        )
    return Verdict(True)


def _supports_registers(family: Family, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether the threads of a consumer have registers for their accumulators and for what else they hold.

    ptxas counts twice: a wgmma may have no more operands than the registers that every thread is launched with, and
    what a consumer holds after setmaxnreg must not be spilled. The second numbers are from what ptxas made of every
    tile; a compile test holds them to it.
    """
    size = footprint(family, config)
    launched = min(255, target.registers_per_sm // size.threads // 8 * 8)
    accumulators = config.tile_n // 2
    operands = accumulators + 32  # descriptors and the position in the ring
    if launched < operands:
        return Verdict(
            False,
            f"{size.threads} threads leave {launched} registers each; tile_n = {config.tile_n} needs about {operands}",
        )
    held, why = operands, ""
    if family.promote:
        held, why = 2 * accumulators + 24, " with promoted sums, which take twice the accumulators,"
    elif family.residual:
        held, why = accumulators + 48, " with a residual to load"
    elif _adds_or_reduces(family, config):
        held, why = accumulators + 48, f" with stream_k and the store of {family.op.value}"
    elif family.op in SPARSE_OPS:
        held, why = accumulators + 40, " with the metadata of the next k-block"
    if size.consumer_registers < held:
        return Verdict(
            False,
            f"a thread of a {config.tile_m}x{config.tile_n} tile has {size.consumer_registers} registers;"
            f"{why} it needs about {held}",
        )
    return Verdict(True)


def _adds_or_reduces(family: Family, config: KernelConfig) -> bool:
    """Whether the store of a split weight gradient needs more registers: it reads what it adds to, or it has one CTA a
    cluster to do all of it."""
    adds = family.accumulate and family.out is not DType.FP32
    return family.op is Op.SPGEMM_TOKENS and config.stream_k and (adds or config.cluster_m == 1)


def tiles() -> tuple[tuple[int, int], ...]:
    """Rows and columns of every tile."""
    return tuple((tile.m, tile.n) for tile in TILES)


def is_timed(config: KernelConfig) -> bool:
    """Whether the cost model has been held to times of the configuration's tile."""
    return any((tile.m, tile.n) == (config.tile_m, config.tile_n) and tile.timed for tile in TILES)


def configs(problem: Problem, target: GpuTarget) -> Iterator[KernelConfig]:
    """What may be worth trying; not all of it is valid. The ring is always as deep as fits.

    Tiles of fewer elements than 128x256 move more bytes per FLOP; they are tried only where larger ones would leave
    multiprocessors idle, and there the raster hardly matters.
    """
    family = problem.family
    few_tiles = -(-problem.m // 128) * -(-problem.n // 256) < target.sm_count
    groups = (_DEFAULT_GROUP,) if few_tiles else _RASTER_GROUPS
    producers = (Producer.WARPGROUP, Producer.THREAD)
    for tile, cluster_m, producer, stream_k in itertools.product(TILES, (2, 1), producers, (False, True)):
        small = tile.m * tile.n < _LARGE // (2 if family.promote else 1)
        if small and (stream_k or not few_tiles):  # stream-K fills the GPU with large tiles
            continue
        base = KernelConfig(tile.m, tile.n, _tile_k(family), cluster_m, producer=producer, stream_k=stream_k)
        base = dataclasses.replace(base, stages=max_stages(family, base, target.smem_per_block))
        for group in groups:
            yield dataclasses.replace(base, raster_group=group)


def default(problem: Problem, target: GpuTarget) -> KernelConfig:
    """A tile every kernel is at its fastest or near it with, split along K where that fills a wave that is short enough
    to pay for it. One CTA a cluster where a second would find no rows."""
    family = problem.family
    config = KernelConfig(
        tile_m=128,
        tile_n=128 if family.promote else 256,
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
