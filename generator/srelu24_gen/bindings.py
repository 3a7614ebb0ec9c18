"""The names a template binds, derived from a spec. Templates hold no arithmetic: it is here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from srelu24_gen.spec import (
    EPILOGUES,
    PRUNED_ACTIVATIONS,
    DType,
    Family,
    Instructions,
    KernelConfig,
    KernelSpec,
    Op,
    Producer,
)

WARPGROUP_THREADS = 128
PRODUCER_LAG = 2
"""Stages a producer thread leaves empty: what it refills was read so many steps ago."""
SPARSE_OPS = (Op.SPGEMM, Op.SPGEMM_TOKENS)
"""Kernels whose A is packed."""
PACKING_OPS = (*PRUNED_ACTIVATIONS, Op.GEMM_DRELU2_24)
"""GEMMs whose output is packed."""
E_VECTOR_COLUMNS = 256
"""Columns of the pruned operand that one 16-byte vector of E covers."""

SWIZZLE_BYTES = 1024
"""After how many bytes the swizzle's pattern repeats: what a stage begins at."""
K_BLOCK_BYTES = 128
"""Of a row of B in a k-block: the span of the swizzle."""
_MOST_STAGES = 8
"""Deeper rings hide nothing more: eight k-blocks are several microseconds."""


@dataclass(frozen=True, slots=True)
class CppType:
    """How C++ spells a :class:`DType`."""

    element: str
    """The type of an element."""
    mma: str
    """Its part in the names of CUTLASS's MMA atoms."""


CPP_TYPES = {
    DType.BF16: CppType("cutlass::bfloat16_t", "BF16"),
    DType.FP16: CppType("cutlass::half_t", "F16"),
    DType.E4M3: CppType("cutlass::float_e4m3_t", "E4M3"),
    DType.E5M2: CppType("cutlass::float_e5m2_t", "E5M2"),
    DType.FP32: CppType("float", "F32"),
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a GEMM kernel occupies on a multiprocessor, derived from its spec."""

    consumers: int
    """Consumer warpgroups: 64 rows of the tile each. None where all warps load and multiply."""
    threads: int
    stage_bytes_a: int
    stage_bytes_b: int
    shared_bytes: int
    """Dynamic shared memory."""
    producer_registers: int
    consumer_registers: int
    """Registers a thread of a consumer has: what setmaxnreg or the launch bounds give it."""


def footprint(family: Family, config: KernelConfig) -> Footprint:
    """Threads, registers and shared memory of a GEMM kernel."""
    if config.producer is Producer.ALL:
        return _footprint_of_warps(family, config)
    consumers = config.tile_m // 64
    producer = config.producer is Producer.WARPGROUP
    threads = WARPGROUP_THREADS * (consumers + producer)
    k_bytes = config.tile_k * family.dtype.bytes
    bytes_a = config.tile_m * k_bytes // (2 if family.op in SPARSE_OPS else 1)
    bytes_b = config.tile_n * k_bytes
    # The launch gives every thread an equal share, in steps of 8; setmaxnreg moves the producer's to the consumers.
    share = min(255, 65536 // threads // 8 * 8)
    reallocates = producer and consumers > 1
    producer_registers = 40 if reallocates else share
    consumer_registers = min(240, (share * (consumers + 1) - 40) // consumers // 8 * 8) if reallocates else share
    return Footprint(
        consumers=consumers,
        threads=threads,
        stage_bytes_a=bytes_a,
        stage_bytes_b=bytes_b,
        shared_bytes=_shared_storage_bytes(family, config, bytes_a, bytes_b, consumers),
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
    )


def _shared_storage_bytes(family: Family, config: KernelConfig, bytes_a: int, bytes_b: int, consumers: int) -> int:
    """``sizeof(SharedStorage)`` of ``sm90/pipeline.cuh``, member by member; the kernel asserts that it is."""
    works = 1 if config.producer is Producer.WARPGROUP else config.stages - PRODUCER_LAG + 2
    barrier = 8
    columns = 2 * 4 * config.tile_n + 2 * 4 * (config.tile_n if family.bias else 4) + 4 * barrier
    size = config.stages * (bytes_a + bytes_b)  # both in whole patterns of the swizzle
    size = _aligned(size + config.stages * 2 * barrier, 16)
    size += 16 * works
    size += 4 * consumers * 48  # pieces, one for each warp
    size += columns if family.scaled else 1
    return _aligned(size, SWIZZLE_BYTES)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


WARP_COLUMNS = 64
"""Columns of the tile that a warp of the mma.sync kernels owns: what one word of E covers."""


def warp_rows(config: KernelConfig) -> int:
    """Rows of the tile that a warp of the mma.sync kernels owns: 64, or 32 where that gives a tile four warps."""
    return 64 if config.tile_m * config.tile_n >= 4 * 64 * WARP_COLUMNS else 32


def _footprint_of_warps(family: Family, config: KernelConfig) -> Footprint:
    threads = 32 * (config.tile_m // warp_rows(config)) * (config.tile_n // WARP_COLUMNS)
    k_bytes = config.tile_k * family.dtype.bytes
    bytes_a = config.tile_m * k_bytes // (2 if family.op is Op.SPGEMM else 1)
    bytes_b = config.tile_n * k_bytes
    registers = min(255, 65536 // threads)
    return Footprint(
        consumers=0,
        threads=threads,
        stage_bytes_a=bytes_a,
        stage_bytes_b=bytes_b,
        shared_bytes=config.stages * (bytes_a + bytes_b),
        producer_registers=registers,
        consumer_registers=registers,
    )


def max_stages(family: Family, config: KernelConfig, shared_bytes: int) -> int:
    """The deepest useful ring that fits in so much shared memory; 0 where none does."""
    one = footprint(family, dataclasses.replace(config, stages=1)).shared_bytes
    two = footprint(family, dataclasses.replace(config, stages=2)).shared_bytes
    return max(0, min(_MOST_STAGES, 1 + (shared_bytes - one) // (two - one)))


def load_block(op: Op) -> int:
    """Rows of B that the kernel's load order permutes together (``load_order.cuh``)."""
    return 64 if op in (*PACKING_OPS, Op.SPGEMM_TOKENS) else 32


def loads_ragged_n(config: KernelConfig) -> bool:
    """Whether the kernel can load an N that ends inside a block of :func:`load_block` rows.

    A producer thread shares its registers with the accumulators and has none left for that path.
    """
    return config.producer is not Producer.THREAD


def template_for(spec: KernelSpec) -> str:
    """Path of the template below ``templates/``."""
    family = "gemm" if spec.family.op.multiplies else spec.family.op.value
    return f"{spec.instructions.folder}/{family}.cu.jinja"


def names_for(spec: KernelSpec) -> dict[str, str | int]:
    """Every name the spec's template may use; C++ spellings, so booleans are "true" and "false"."""
    family, config = spec.family, spec.config
    names: dict[str, str | int] = {
        "name": spec.name,
        "element": CPP_TYPES[family.dtype].element,
        "activation": EPILOGUES[family.activation].struct,
    }
    if not family.op.multiplies:
        return names
    size = footprint(family, config)
    names |= {
        "tile_m": config.tile_m,
        "tile_n": config.tile_n,
        "tile_k": config.tile_k,
        "stages": config.stages,
        "stream_k": _cpp(config.stream_k),
        "threads": size.threads,
        "shared_bytes": size.shared_bytes,
        "sparse": _cpp(family.op in SPARSE_OPS),
        "output": CPP_TYPES[family.out or family.dtype].element,
        "load_order": "kOwn16" if family.op in PACKING_OPS else "kOwn8",
        "prune": _cpp(family.op.prunes),
        "bias": _cpp(family.bias),
        "residual": _cpp(family.residual),
        "count_nonzeros": _cpp(family.count_nonzeros),
    }
    own = {Instructions.WGMMA: _wgmma_names, Instructions.MMA_SYNC: _mma_sync_names}[spec.instructions]
    return names | own(family, config, size)


def _wgmma_names(family: Family, config: KernelConfig, size: Footprint) -> dict[str, str | int]:
    return {
        "cluster_m": config.cluster_m,
        "consumers": size.consumers,
        "producer_warpgroup": _cpp(config.producer is Producer.WARPGROUP),
        "producer_lag": PRODUCER_LAG,
        "producer_registers": size.producer_registers,
        "consumer_registers": size.consumer_registers,
        "scaled": _cpp(family.scaled),
        "promote": _cpp(family.promote),
        "mma": _wgmma(family, config.tile_n),
        "stage_bytes_a": size.stage_bytes_a,
        "stage_bytes_b": size.stage_bytes_b,
        "ragged_n": _cpp(loads_ragged_n(config)),
        "major": "MN" if family.op is Op.SPGEMM_TOKENS else "K",
        "hidden_gradient": _cpp(family.op is Op.GEMM_DRELU2_24),
        "along_tokens": _cpp(family.op is Op.SPGEMM_TOKENS),
        **{name: _cpp(getattr(family, name)) for name in ("tokens", "permuted", "accumulate", "transposed")},
    }


def _mma_sync_names(family: Family, config: KernelConfig, size: Footprint) -> dict[str, str | int]:
    weight = family.weight or family.dtype
    k = 32 // family.dtype.bytes  # of a dense MMA, which takes 32 bytes of it
    first = 89 if family.scaled else 80
    types = CPP_TYPES[family.dtype].mma + CPP_TYPES[weight].mma
    return {
        "warp_m": warp_rows(config),
        "warp_n": WARP_COLUMNS,
        "weight": CPP_TYPES[weight].element,
        "scaled": _cpp(family.scaled),
        "mma": f"SM{first}_16x8x{k}_F32{types}F32_TN",
        "mma_k": 2 * k,
    }


def _wgmma(family: Family, n: int) -> str:
    """The CUTLASS atom below ``cute::SM90::GMMA``: an instruction takes 32 bytes of K, of packed A too."""
    k = 32 // family.dtype.bytes
    types = "F32" + CPP_TYPES[family.dtype].mma + CPP_TYPES[family.weight or family.dtype].mma
    order = "_TN" if family.scaled else ""  # 8-bit operands are K-major, and their atoms say so by name
    return (
        f"SPARSE::GMMA_64x{n}x{2 * k}_{types}_SS{order}"
        if family.op in SPARSE_OPS
        else f"MMA_64x{n}x{k}_{types}_SS{order}"
    )


def _cpp(value: bool) -> str:
    return "true" if value else "false"
