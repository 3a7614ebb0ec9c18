"""The names a template binds, derived from a spec. Templates hold no arithmetic: it is here."""

from __future__ import annotations

from dataclasses import dataclass

from srelu24_gen.spec import Activation, DType, KernelConfig, KernelSpec, Op, Producer

WARPGROUP_THREADS = 128
BOOKKEEPING_BYTES = 1024
"""Shared memory besides the ring: barriers, works to come, the rounding of the whole to the swizzle's alignment."""
PRODUCER_LAG = 2
"""Stages a producer thread leaves empty: what it refills was read so many steps ago."""
SPARSE_OPS = (Op.SPGEMM, Op.SPGEMM_TOKENS)
"""Kernels whose A is packed."""
PACKING_OPS = (Op.GEMM_RELU2_24, Op.GEMM_DRELU2_24)
"""GEMMs whose output is packed."""
E_VECTOR_COLUMNS = 256
"""Columns of the pruned operand that one 16-byte vector of E covers."""

_ELEMENT = {DType.BF16: "bfloat16_t", DType.FP16: "half_t"}
_MMA_TYPE = {DType.BF16: "BF16", DType.FP16: "F16"}


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a GEMM kernel occupies on a multiprocessor, derived from its spec."""

    consumers: int
    """Consumer warpgroups: 64 rows of the tile each."""
    threads: int
    stage_bytes_a: int
    stage_bytes_b: int
    shared_bytes: int
    """Dynamic shared memory."""
    producer_registers: int
    consumer_registers: int
    """Registers a thread of a consumer has: what setmaxnreg or the launch bounds give it."""


def footprint(op: Op, dtype: DType, config: KernelConfig) -> Footprint:
    """Threads, registers and shared memory of a GEMM kernel (any op but sparsify24)."""
    consumers = config.tile_m // 64
    producer = config.producer is Producer.WARPGROUP
    threads = WARPGROUP_THREADS * (consumers + producer)
    k_bytes = config.tile_k * dtype.bytes
    bytes_a = config.tile_m * k_bytes // (2 if op in SPARSE_OPS else 1)
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
        shared_bytes=config.stages * (bytes_a + bytes_b) + BOOKKEEPING_BYTES,
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
    )


def load_block(op: Op) -> int:
    """Rows of B that the kernel's load order permutes together (``LoadOrder`` in ``tile_load.cuh``)."""
    return 64 if op in (*PACKING_OPS, Op.SPGEMM_TOKENS) else 32


def loads_ragged_n(config: KernelConfig) -> bool:
    """Whether the kernel can load an N that ends inside a block of :func:`load_block` rows.

    A producer thread shares its registers with the accumulators and has none left for that path.
    """
    return config.producer is Producer.WARPGROUP


def template_for(spec: KernelSpec) -> str:
    """Path of the template below ``templates/``."""
    family = "sparsify24" if spec.family.op is Op.SPARSIFY24 else "gemm"
    return f"{spec.arch.removesuffix('a').replace('_', '')}/{family}.cu.jinja"


def names_for(spec: KernelSpec) -> dict[str, str | int]:
    """Every name the spec's template may use; C++ spellings, so booleans are "true" and "false"."""
    family, config = spec.family, spec.config
    names: dict[str, str | int] = {
        "name": spec.name,
        "element": _ELEMENT[family.dtype],
        "relu2": _cpp(family.activation is Activation.RELU2),
    }
    if family.op is Op.SPARSIFY24:
        return names
    sparse, prune = family.op in SPARSE_OPS, family.op in PACKING_OPS
    size = footprint(family.op, family.dtype, config)
    types = f"F32{_MMA_TYPE[family.dtype]}{_MMA_TYPE[family.dtype]}"
    return names | {
        "tile_m": config.tile_m,
        "tile_n": config.tile_n,
        "tile_k": config.tile_k,
        "cluster_m": config.cluster_m,
        "stages": config.stages,
        "stream_k": _cpp(config.stream_k),
        "consumers": size.consumers,
        "threads": size.threads,
        "producer_warpgroup": _cpp(config.producer is Producer.WARPGROUP),
        "producer_lag": PRODUCER_LAG,
        "producer_registers": size.producer_registers,
        "consumer_registers": size.consumer_registers,
        "sparse": _cpp(sparse),
        "mma": f"GMMA_64x{config.tile_n}x32_{types}_SS" if sparse else f"MMA_64x{config.tile_n}x16_{types}_SS",
        "stage_bytes_a": size.stage_bytes_a,
        "stage_bytes_b": size.stage_bytes_b,
        "shared_bytes": size.shared_bytes,
        "ragged_n": _cpp(loads_ragged_n(config)),
        "load_order": "kOwn16" if prune else "kOwn8",
        "prune": _cpp(family.op is Op.GEMM_RELU2_24),
        "bias": _cpp(family.bias),
        "residual": _cpp(family.residual),
        "count_nonzeros": _cpp(family.count_nonzeros),
        "output": "float" if family.fp32 else f"cutlass::{_ELEMENT[family.dtype]}",
        "major": "MN" if family.op is Op.SPGEMM_TOKENS else "K",
        "hidden_gradient": _cpp(family.op is Op.GEMM_DRELU2_24),
        "along_tokens": _cpp(family.op is Op.SPGEMM_TOKENS),
        **{name: _cpp(getattr(family, name)) for name in ("tokens", "permuted", "accumulate", "transposed")},
    }


def _cpp(value: bool) -> str:
    return "true" if value else "false"
