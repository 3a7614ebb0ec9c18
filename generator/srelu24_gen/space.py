"""The kernel space: which configurations are valid for a problem, and which one to start from.

:func:`supports` is the one place that knows; the tuner, the dispatcher and the user's error message
all ask it, and it gives the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from srelu24_gen.bindings import E_VECTOR_COLUMNS, PACKING_OPS, footprint, load_block, loads_ragged_n
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, Family, KernelConfig, Op, Problem, Producer
from srelu24_gen.target import GpuTarget

ARCH = "sm_90a"
MAX_EXTENT = 2**31 - 2**16
"""M, N and K are 32-bit in the kernels, with room for the last tile; element counts may be larger."""

_TILES_M = (64, 128, 192)
_TILES_N = (128, 256)
_LEAST_SPLIT_M = 128
_ACCUMULATOR_OVERHEAD = 32
"""Registers a consumer thread needs besides its accumulators: descriptors, ring position, E."""
_DEFAULT_GROUP = 8
_RASTER_GROUPS = (2, 4, _DEFAULT_GROUP, 16)
_MOST_STAGES = 8
"""Deeper rings hide nothing more: eight k-blocks are several microseconds."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a configuration is valid; if not, one sentence says why."""

    ok: bool
    reason: str = ""


def supports_problem(problem: Problem, target: GpuTarget) -> Verdict:
    """Whether any kernel here computes ``problem`` on ``target``."""
    family = problem.family
    if target.arch != ARCH:
        return Verdict(False, f"{target.name} is {target.arch}; the kernels need {ARCH} (Hopper)")
    if problem.m < 0 or problem.n < 1 or (family.op is not Op.SPARSIFY24 and problem.k < 1):
        return Verdict(False, f"sizes {problem.m}x{problem.n}x{problem.k} must be positive (M may be 0)")
    for name, extent in (("M", problem.m), ("N", problem.n), ("K", problem.k)):
        if extent > MAX_EXTENT:
            return Verdict(False, f"{name} = {extent} is above {MAX_EXTENT}; split the problem along {name}")
    for name, extent in (("N", problem.n), ("K", problem.k)):
        if extent % 8:
            return Verdict(False, f"{name} = {extent} is not a multiple of 8; pad the layer's width")
    if trains(family):
        verdict = _supports_training_sizes(problem)
        if not verdict.ok:
            return verdict
    return supports_family(family)


def trains(family: Family) -> bool:
    """Whether it is a kernel of a training step."""
    return family.op in (Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS) or family.tokens or family.permuted


def _supports_training_sizes(problem: Problem) -> Verdict:
    """Groups along tokens are whole blocks of 16, and what lies along a swizzled row is whole rows of 64."""
    weights = problem.family.op is Op.SPGEMM_TOKENS
    tokens, widths = (problem.k, (problem.m, problem.n)) if weights else (problem.m, (problem.n, problem.k))
    if tokens % 16:
        return Verdict(False, f"{tokens} tokens are not a multiple of 16; pad the batch")
    for width in widths:
        if width % 64:
            return Verdict(False, f"a width of {width} is not a multiple of 64; pad the layer's width")
    return Verdict(True)


def supports_family(family: Family) -> Verdict:
    """Whether the family's options go together."""
    op = family.op
    if op is Op.GEMM_RELU2_24 and family.activation is not Activation.RELU2:
        return Verdict(False, "gemm_relu2_24 always applies squared ReLU; its activation must be relu2")
    if op is Op.SPGEMM and family.activation is not Activation.NONE:
        return Verdict(False, "spgemm has no activation; it is the second GEMM of the layer")
    if family.count_nonzeros and op is not Op.GEMM_RELU2_24:
        return Verdict(False, f"only gemm_relu2_24 counts non-zeros, not {op.value}")
    if family.residual and op is not Op.SPGEMM:
        return Verdict(False, f"only spgemm adds a residual, not {op.value}")
    if family.bias and op in (Op.SPARSIFY24, Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS):
        return Verdict(False, f"{op.value} takes no bias")
    return _supports_training_options(family)


def _supports_training_options(family: Family) -> Verdict:
    op = family.op
    if op is Op.GEMM_DRELU2_24 and not family.tokens:
        return Verdict(False, "gemm_drelu2_24 always packs along tokens")
    if op in (Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS) and family.activation is not Activation.NONE:
        return Verdict(False, f"{op.value} has no activation")
    if family.tokens and op not in PACKING_OPS:
        return Verdict(False, f"only GEMMs with a packed output pack along tokens, not {op.value}")
    if family.permuted and (op in (Op.SPARSIFY24, Op.SPGEMM_TOKENS) or family.residual):
        return Verdict(False, f"{op.value}{' with a residual' * family.residual} has no rows to permute")
    if op is not Op.SPGEMM_TOKENS:
        for name in ("fp32", "accumulate", "transposed"):
            if getattr(family, name):
                return Verdict(False, f"only spgemm_tokens has an output that is {name}, not {op.value}")
    return Verdict(True)


def supports(problem: Problem, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether ``config`` computes ``problem`` correctly on ``target``, with the reason if not."""
    verdict = supports_problem(problem, target)
    if not verdict.ok:
        return verdict
    block = load_block(problem.family.op)
    if problem.n % block and not loads_ragged_n(config) and problem.family.op is not Op.SPARSIFY24:
        return Verdict(False, f"N = {problem.n} is not a multiple of {block}, which a producer thread cannot load")
    return supports_config(problem.family, config, target)


def supports_config(family: Family, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether the kernel of ``family`` can be built as ``config`` for ``target``; sizes do not matter."""
    op, c = family.op, config
    if op is Op.SPARSIFY24:
        return Verdict(True) if c == KernelConfig() else Verdict(False, "sparsify24 has only the default config")
    if c.tile_m not in _TILES_M:
        return Verdict(False, f"tile_m = {c.tile_m} is not one of {_TILES_M}: a consumer warpgroup owns 64 rows")
    if c.tile_n not in _TILES_N:
        return Verdict(False, f"tile_n = {c.tile_n} is not one of {_TILES_N}, the MMA widths the templates bind")
    if op in PACKING_OPS and c.tile_n != E_VECTOR_COLUMNS:
        return Verdict(False, f"{op.value} needs tile_n = {E_VECTOR_COLUMNS}: a tile writes whole vectors of E")
    if c.tile_k != 64:
        return Verdict(False, f"tile_k = {c.tile_k} is not 64, the 128-byte swizzle span of 16-bit B")
    if c.cluster_m not in (1, 2):
        return Verdict(False, f"cluster_m = {c.cluster_m} is not 1 or 2; 4 leaves multiprocessors idle")
    if c.raster_group < 1:
        return Verdict(False, f"raster_group = {c.raster_group} must be at least 1")
    size = footprint(op, family.dtype, c)
    needed = c.tile_n // 2 + _ACCUMULATOR_OVERHEAD
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
    if c.stream_k and c.tile_m == max(_TILES_M) and (family.transposed or family.accumulate):
        return Verdict(False, f"a {c.tile_m}-row tile has no registers left for stream_k and such a store")
    if family.residual and c.tile_m == max(_TILES_M) and c.tile_n == max(_TILES_N):
        return Verdict(False, f"a {c.tile_m}x{c.tile_n} tile has no registers left to load a residual")
    least = 2 if c.producer is Producer.WARPGROUP else 3
    if c.stages < least:
        return Verdict(False, f"stages = {c.stages}; a {c.producer.value} producer needs at least {least}")
    if size.shared_bytes > target.smem_per_block:
        return Verdict(
            False, f"{c.stages} stages need {size.shared_bytes} bytes of shared memory; {target.smem_per_block} there"
        )
    return Verdict(True)


def max_stages(family: Family, config: KernelConfig, target: GpuTarget) -> int:
    """The deepest useful ring that fits the shared memory of ``target``."""
    one = footprint(family.op, family.dtype, dataclasses.replace(config, stages=1)).shared_bytes
    two = footprint(family.op, family.dtype, dataclasses.replace(config, stages=2)).shared_bytes
    return min(_MOST_STAGES, 1 + (target.smem_per_block - one) // (two - one))


def candidates(problem: Problem, target: GpuTarget) -> list[KernelConfig]:
    """Every configuration worth trying, the default first. The ring is always as deep as fits.

    Tiles of less than 128x256 move more bytes per FLOP; they are tried only where larger ones would leave
    multiprocessors idle, and there the raster hardly matters.

    Raises:
        Unsupported: no kernel computes the problem; the message is the reason.
    """
    first = default(problem, target)
    if problem.family.op is Op.SPARSIFY24:
        return [first]
    few_tiles = -(-problem.m // 128) * -(-problem.n // 256) < target.sm_count
    groups = (_DEFAULT_GROUP,) if few_tiles else _RASTER_GROUPS
    found = [first]
    for tile_m, tile_n, cluster_m, producer, stream_k in itertools.product(
        _TILES_M, _TILES_N, (2, 1), Producer, (False, True)
    ):
        small = tile_m < 128 or tile_n < max(_TILES_N)
        if small and (stream_k or not few_tiles):  # stream-K fills the GPU with large tiles
            continue
        base = KernelConfig(tile_m=tile_m, tile_n=tile_n, cluster_m=cluster_m, producer=producer, stream_k=stream_k)
        base = dataclasses.replace(base, stages=max_stages(problem.family, base, target))
        for group in groups:
            config = dataclasses.replace(base, raster_group=group)
            if config not in found and supports(problem, config, target).ok:
                found.append(config)
    return found


def default(problem: Problem, target: GpuTarget) -> KernelConfig:
    """A good configuration without measuring: a tile every kernel is at its fastest or near it with, split along K
    where it would leave a wave short. One CTA a cluster where a second would find no rows.

    Raises:
        Unsupported: no kernel computes the problem; the message is the reason.
    """
    verdict = supports_problem(problem, target)
    if not verdict.ok:
        raise Unsupported(f"{problem}: {verdict.reason}.")
    if problem.family.op is Op.SPARSIFY24:
        return KernelConfig()
    config = KernelConfig(tile_m=128, cluster_m=2 if problem.m > 128 else 1, stream_k=True)
    return dataclasses.replace(config, stages=max_stages(problem.family, config, target))
