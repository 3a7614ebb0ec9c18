"""The kernel space: which configurations are valid for a problem, and which one to start from.

:func:`supports` is the one place that knows; the tuner, the dispatcher and the user's error message
all ask it, and it gives the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from srelu24_gen.bindings import E_VECTOR_COLUMNS, K_BLOCK_BYTES, PACKING_OPS, footprint, load_block, loads_ragged_n
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import WIDE_TYPES, Activation, DType, Family, KernelConfig, Op, Problem, Producer
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
    if problem.m < 0 or problem.n < 1 or (family.op.multiplies and problem.k < 1):
        return Verdict(False, f"sizes {problem.m}x{problem.n}x{problem.k} must be positive (M may be 0)")
    for name, extent in (("M", problem.m), ("N", problem.n), ("K", problem.k)):
        if extent > MAX_EXTENT:
            return Verdict(False, f"{name} = {extent} is above {MAX_EXTENT}; split the problem along {name}")
    step = 16 if DType.E4M3 in (family.dtype, family.out) else 8  # 16 bytes of packed values are twice as many columns
    for name, extent in (("N", problem.n), ("K", problem.k)):
        if extent % step:
            return Verdict(False, f"{name} = {extent} is not a multiple of {step}; pad the layer's width")
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
    if family.bias and op not in (Op.GEMM, Op.GEMM_RELU2_24, Op.SPGEMM):
        return Verdict(False, f"{op.value} takes no bias")
    verdict = _supports_training_options(family)
    return _supports_types(family) if verdict.ok else verdict


def _supports_training_options(family: Family) -> Verdict:
    op = family.op
    if op is Op.GEMM_DRELU2_24 and not family.tokens:
        return Verdict(False, "gemm_drelu2_24 always packs along tokens")
    if op in (Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS) and family.activation is not Activation.NONE:
        return Verdict(False, f"{op.value} has no activation")
    if family.tokens and op not in PACKING_OPS:
        return Verdict(False, f"only GEMMs with a packed output pack along tokens, not {op.value}")
    if family.permuted and (not op.multiplies or op is Op.SPGEMM_TOKENS or family.residual):
        return Verdict(False, f"{op.value}{' with a residual' * family.residual} has no rows to permute")
    for name in ("accumulate", "transposed"):
        if getattr(family, name) and op is not Op.SPGEMM_TOKENS:
            return Verdict(False, f"only spgemm_tokens has an output that is {name}, not {op.value}")
    if (family.tokens or family.permuted) and family.dtype not in WIDE_TYPES:
        return Verdict(False, f"a training step does not take {family.dtype.value}")
    return Verdict(True)


_RESULTS: dict[tuple[Op, DType], tuple[DType | None, ...]] = {
    **{(op, dtype): (None,) for op in (Op.GEMM, Op.GEMM_RELU2_24, Op.SPGEMM, Op.SPARSIFY24) for dtype in WIDE_TYPES},
    (Op.GEMM, DType.E4M3): WIDE_TYPES,
    (Op.GEMM_RELU2_24, DType.E4M3): (DType.BF16, DType.E4M3),
    (Op.SPGEMM, DType.E4M3): WIDE_TYPES,
    **{(Op.QUANTIZE_ROWS, dtype): (DType.E4M3,) for dtype in WIDE_TYPES},
    (Op.SQUARE_ROWS, DType.BF16): (DType.E4M3,),
    **{(Op.GEMM_DRELU2_24, dtype): (None,) for dtype in WIDE_TYPES},
    **{(Op.SPGEMM_TOKENS, dtype): (None, DType.FP32) for dtype in WIDE_TYPES},
}
"""Types of the result for a type of A; None is that type."""


def _supports_types(family: Family) -> Verdict:
    op, dtype = family.op, family.dtype
    results = _RESULTS.get((op, dtype))
    if results is None:
        return Verdict(False, f"{op.value} does not take {dtype.value}")
    if family.out not in results:
        given = family.out.value if family.out else "of its own type"
        wanted = " or ".join(r.value if r else "of its own type" for r in results)
        return Verdict(False, f"the result of {op.value} on {dtype.value} is {wanted}, not {given}")
    if not family.scaled and (family.weight or family.promote):
        return Verdict(False, f"{op.value} on {dtype.value} has no other type of weight and no promoted sums")
    if family.weight not in (None, DType.E5M2):
        return Verdict(False, f"a weight beside {dtype.value} is {dtype.value} or e5m2, not {family.weight}")
    if family.scaled and family.count_nonzeros:
        return Verdict(False, "the 8-bit gemm_relu2_24 does not count non-zeros")
    if op in (Op.QUANTIZE_ROWS, Op.SQUARE_ROWS) and family.activation is not Activation.NONE:
        return Verdict(False, f"{op.value} has no activation")
    return Verdict(True)


def supports(problem: Problem, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether ``config`` computes ``problem`` correctly on ``target``, with the reason if not."""
    verdict = supports_problem(problem, target)
    if not verdict.ok:
        return verdict
    block = load_block(problem.family.op)
    if problem.n % block and not loads_ragged_n(config) and problem.family.op.multiplies:
        return Verdict(False, f"N = {problem.n} is not a multiple of {block}, which a producer thread cannot load")
    return supports_config(problem.family, config, target)


def supports_config(family: Family, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether the kernel of ``family`` can be built as ``config`` for ``target``; sizes do not matter."""
    op, c = family.op, config
    if not op.multiplies:
        return Verdict(True) if c == KernelConfig() else Verdict(False, f"{op.value} has only the default config")
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
    size = footprint(op, family.dtype, c)
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
        if c.stream_k and (family.transposed or family.accumulate):
            return Verdict(False, f"a {c.tile_m}x{c.tile_n} tile has no registers left for stream_k and such a store")
        if family.scaled and op is Op.SPGEMM and (family.bias or c.stream_k):
            return Verdict(
                False, f"a {c.tile_m}x{c.tile_n} tile has no registers left for scales and a bias or stream_k"
            )
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
    if not problem.family.op.multiplies:
        return [first]
    few_tiles = -(-problem.m // 128) * -(-problem.n // 256) < target.sm_count
    groups = (_DEFAULT_GROUP,) if few_tiles else _RASTER_GROUPS
    found = [first]
    for tile_m, tile_n, cluster_m, producer, stream_k in itertools.product(
        _TILES_M, _TILES_N, (2, 1), Producer, (False, True)
    ):
        small = tile_m < 128 or (tile_n < max(_TILES_N) and not problem.family.promote)
        if small and (stream_k or not few_tiles):  # stream-K fills the GPU with large tiles
            continue
        base = KernelConfig(tile_m, tile_n, _tile_k(problem.family), cluster_m, producer=producer, stream_k=stream_k)
        base = dataclasses.replace(base, stages=max_stages(problem.family, base, target))
        for group in groups:
            config = dataclasses.replace(base, raster_group=group)
            if config not in found and supports(problem, config, target).ok:
                found.append(config)
    return found


def batch_invariant(problem: Problem, config: KernelConfig, target: GpuTarget) -> KernelConfig:
    """The batch-invariant configuration most like ``config``, which is valid for ``problem``."""
    whole = dataclasses.replace(config, stream_k=False, tile_n=256)
    if supports(problem, whole, target).ok:
        return whole
    return dataclasses.replace(default(problem, target), stream_k=False)


def default(problem: Problem, target: GpuTarget) -> KernelConfig:
    """A good configuration without measuring: a tile every kernel is at its fastest or near it with, split along K
    where it would leave a wave short. One CTA a cluster where a second would find no rows.

    Raises:
        Unsupported: no kernel computes the problem; the message is the reason.
    """
    verdict = supports_problem(problem, target)
    if not verdict.ok:
        raise Unsupported(f"{problem}: {verdict.reason}.")
    family = problem.family
    if not family.op.multiplies:
        return KernelConfig()
    config = KernelConfig(
        tile_m=128,
        tile_n=min(_TILES_N) if family.promote else max(_TILES_N),
        tile_k=_tile_k(family),
        cluster_m=2 if problem.m > 128 else 1,
        stream_k=True,
    )
    return dataclasses.replace(config, stages=max_stages(problem.family, config, target))


def _tile_k(family: Family) -> int:
    return K_BLOCK_BYTES // family.dtype.bytes
