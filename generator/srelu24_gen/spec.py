"""What a kernel computes (Family), on what sizes (Problem), and how (KernelConfig).

Three things are kept apart: a :class:`Problem` is what a caller has, a :class:`KernelConfig` is
what is searched and stored, everything else is derived. A :class:`KernelSpec` (family + config)
carries no M, N, K: one binary serves every size of its family.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from srelu24_gen.errors import Unsupported


class Op(StrEnum):
    """The kernels. Shapes: A is [M, K], B is [N, K] (a torch Linear weight), output [M, N]."""

    GEMM = "gemm"
    """Dense A B^T; M tokens, N output features, K input features."""
    GEMM_RELU2_24 = "gemm_relu2_24"
    """Dense A B^T, then squared ReLU, 2:4 pruning along N, packed output. N = F, K = D."""
    GEMM_RELU_24 = "gemm_relu_24"
    """The same with plain ReLU."""
    SPGEMM = "spgemm"
    """Packed 2:4 A times dense B^T. N = D, K = F."""
    SPARSIFY24 = "sparsify24"
    """Dense [M, N] to packed 2:4 along N, no matrix product (K is 0)."""
    QUANTIZE_ROWS = "quantize_rows"
    """16-bit [M, N] to e4m3 with a scale for each row (K is 0)."""
    GEMM_DRELU2_24 = "gemm_drelu2_24"
    """Dense A B^T, then 2 (A B^T) sqrt(S) where a packed S [M, N] keeps values; packed as S is and along tokens.
    M tokens, N = F, K = D."""
    SPGEMM_TOKENS = "spgemm_tokens"
    """A^T B over tokens: A [K, M] packed 2:4 along K, B [K, N], output [M, N]. K tokens, M = F, N = D."""
    SQUARE_ROWS = "square_rows"
    """The kept bf16 values of a packed [M, N], squared, to e4m3 with a scale for each row (K is 0)."""
    TRANSPOSE = "transpose"
    """Dense [M, N] to [N, M] (K is 0)."""
    DENSE_COLUMNS = "dense_columns"
    """Some columns of a packed [M, N] to dense, and to zeros in its form along tokens (K is 0)."""

    @property
    def multiplies(self) -> bool:
        """Whether it is a GEMM; the others only move bytes, and have one configuration."""
        return self.prunes or self in (Op.GEMM, Op.SPGEMM, Op.GEMM_DRELU2_24, Op.SPGEMM_TOKENS)

    @property
    def prunes(self) -> bool:
        """Whether it is a first GEMM that applies an activation, prunes and packs: one of :data:`EPILOGUES`."""
        return any(row.pruned is self for row in EPILOGUES.values())


class DType(StrEnum):
    """Storage type of inputs and outputs; accumulation is always fp32."""

    BF16 = "bf16"
    FP16 = "fp16"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    """For weights, beside e4m3 activations."""
    FP32 = "fp32"
    """For weight gradients that are accumulated."""

    @property
    def bytes(self) -> int:
        return {DType.E4M3: 1, DType.E5M2: 1, DType.FP32: 4}.get(self, 2)


WIDE_TYPES = (DType.BF16, DType.FP16)
"""Types that need no scales."""


class Activation(StrEnum):
    """What happens to a value before it is stored or pruned."""

    NONE = "none"
    RELU2 = "relu2"
    RELU = "relu"


@dataclass(frozen=True, slots=True)
class Epilogue:
    """An activation and what there is of it. Its meaning is in ``srelu24.numerics.reference`` and docs/numerics.md."""

    activation: Activation
    struct: str
    """The struct of ``activation.cuh`` that computes it."""
    pruned: Op | None = None
    """The GEMM that applies it and prunes the result to 2:4; None where nothing prunes such results."""
    trains: bool = False
    """Whether the kernels of a training step have its gradient."""
    scales: bool = False
    """Whether the 8-bit kernels have it."""


EPILOGUES: dict[Activation, Epilogue] = {
    row.activation: row
    for row in (
        Epilogue(Activation.NONE, "Identity", scales=True),
        Epilogue(Activation.RELU2, "Relu2", Op.GEMM_RELU2_24, trains=True, scales=True),
        Epilogue(Activation.RELU, "Relu", Op.GEMM_RELU_24),
    )
}
"""One row an epilogue: operations, command line, tuner and tests follow from it (docs/extending.md)."""


def pruning_op(activation: Activation) -> Op:
    """The GEMM that applies an activation and prunes.

    Raises:
        Unsupported: none does.
    """
    op = EPILOGUES[activation].pruned
    if op is None:
        known = ", ".join(row.activation.value for row in EPILOGUES.values() if row.pruned)
        raise Unsupported(f"no kernel prunes the results of the activation {activation.value}; those of {known} are")
    return op


PRUNED_ACTIVATIONS: dict[Op, Activation] = {row.pruned: row.activation for row in EPILOGUES.values() if row.pruned}
"""What each pruning GEMM applies."""


class Producer(StrEnum):
    """Who issues the loads of a kernel."""

    WARPGROUP = "warpgroup"
    """A warpgroup of its own that gives its registers to the consumers (setmaxnreg)."""
    THREAD = "thread"
    """Thread 0 of the first consumer warpgroup, between its MMAs; leaves room for 3 consumers."""
    ALL = "all"
    """Every thread, by cp.async: the mma.sync kernels, which have neither TMA nor roles."""


class Instructions(StrEnum):
    """What a kernel computes and loads with: which of our kernel families (docs/architecture.md) it is of."""

    WGMMA = "wgmma"
    """wgmma, TMA and clusters; native to Hopper."""
    MMA_SYNC = "mma.sync"
    """mma.sync, mma.sp and cp.async; portable, from Ampere on."""

    @property
    def folder(self) -> str:
        """Of its templates, and of its headers."""
        return {Instructions.WGMMA: "sm90", Instructions.MMA_SYNC: "sm80"}[self]

    @property
    def kind(self) -> str:
        """The word for it that users read: native or portable."""
        return "portable" if self is Instructions.MMA_SYNC else "native"


_NATIVE = {"sm_90a": Instructions.WGMMA}
_FIRST_PORTABLE = 80


def instructions_of(arch: str) -> Instructions:
    """The kernel family compiled for an architecture: ``sm_90a`` has a native one, plain ``sm_NN`` the portable.

    Raises:
        Unsupported: no family compiles for it.
    """
    if arch in _NATIVE:
        return _NATIVE[arch]
    number = arch.removeprefix("sm_")
    if number.isdigit() and int(number) >= _FIRST_PORTABLE:
        return Instructions.MMA_SYNC
    known = ", ".join(_NATIVE)
    raise Unsupported(f"no kernels are made for {arch}; native ones for {known}, portable ones for sm_80 and later")


@dataclass(frozen=True, slots=True)
class Family:
    """All that a compiled kernel depends on besides its configuration.

    8-bit operands have scales (docs/fp8.md), and the result another type: in ``out``.
    """

    op: Op
    dtype: DType
    activation: Activation = Activation.NONE
    bias: bool = False
    residual: bool = False
    count_nonzeros: bool = False
    out: DType | None = None
    """Type of the result; None where it is ``dtype``."""
    weight: DType | None = None
    """Type of B; None where it is ``dtype``."""
    promote: bool = False
    """Whether 8-bit products leave the tensor cores' short sums after every 128, for a sum in fp32."""
    tokens: bool = False
    """The output is packed along tokens as well (docs/training.md)."""
    permuted: bool = False
    """Rows of a dense A or of a dense output are tokens in the order of their groups (docs/training.md)."""
    accumulate: bool = False
    """The product is added to the output."""
    transposed: bool = False
    """The output is stored as [N, M]."""

    @property
    def scaled(self) -> bool:
        """Whether it is a GEMM of 8-bit operands."""
        return self.op.multiplies and self.dtype is DType.E4M3

    @property
    def first(self) -> bool:
        """Whether it is a first GEMM of an FFN, of X and W1, or its gradient."""
        return self.op.prunes or self.op is Op.GEMM_DRELU2_24 or (self.op is Op.GEMM and self.activates)

    @property
    def activates(self) -> bool:
        """Whether its results go through an activation."""
        return self.activation is not Activation.NONE

    @property
    def name(self) -> str:
        """For example ``gemm_relu2_24_bf16_bias`` or ``spgemm_e4m3_to_bf16``; unique per family."""
        parts = [self.op.value, self.dtype.value]
        parts += [self.weight.value] if self.weight else []
        parts += ["to", self.out.value] if self.out else []
        parts += ["promoted"] if self.promote else []
        if self.activation is not Activation.NONE and not self.op.prunes:
            parts.append(self.activation.value)
        parts += [n for n in ("bias", "residual") if getattr(self, n)]
        if self.count_nonzeros:
            parts.append("count")
        parts += [n for n in ("tokens", "permuted", "accumulate", "transposed") if getattr(self, n)]
        return "_".join(parts)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a caller has: a family and its sizes. GEMM shapes as in :class:`Op`."""

    family: Family
    m: int
    n: int
    k: int = 0

    @property
    def flops(self) -> int:
        """Dense-equivalent floating-point operations: 2 M N K."""
        return 2 * self.m * self.n * self.k

    @property
    def tokens(self) -> int:
        """M, but K where the product is summed over tokens."""
        return self.k if self.family.op is Op.SPGEMM_TOKENS else self.m

    @property
    def widths(self) -> tuple[int, int]:
        """The two sizes that do not count tokens: widths of the layer."""
        return (self.m, self.n) if self.family.op is Op.SPGEMM_TOKENS else (self.n, self.k)

    def at(self, tokens: int) -> Problem:
        """The same with another number of tokens."""
        if self.family.op is Op.SPGEMM_TOKENS:
            return dataclasses.replace(self, k=tokens)
        return dataclasses.replace(self, m=tokens)

    def __str__(self) -> str:
        return f"{self.family.name} {self.m}x{self.n}x{self.k}"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """What is searched and stored. Fields marked ``runtime`` cost no rebuild.

    Units: tiles in elements, stages in k-blocks, raster_group in tiles of the cluster's height.
    For kernels that are no GEMM every field is unused and the default is the only member.
    """

    tile_m: int = 128
    """Rows of one CTA's output tile: under wgmma 64 per consumer warpgroup."""
    tile_n: int = 256
    """Columns of one CTA's output tile: the N of one wgmma, or 64 per warp under mma.sync."""
    tile_k: int = 64
    """Elements of (uncompressed) K per pipeline stage."""
    cluster_m: int = 2
    """CTAs of one cluster, side by side along M; they share B by multicast."""
    stages: int = 4
    """Depth of the shared-memory ring."""
    producer: Producer = Producer.WARPGROUP
    stream_k: bool = False
    """Whether tiles that do not fill a whole wave are split along K over all clusters; under mma.sync, whether every
    tile is, into as many slices as fill the GPU."""
    raster_group: int = field(default=8, metadata={"runtime": True})
    """Cluster tiles walked along M before moving on along N."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's bits do not depend on the rows beside it (docs/numerics.md, "Run to run").

        All such configurations of a kernel family give the same bits: none splits K, and all use the same MMA. Under
        wgmma that is the one of 256 columns; mma.sync has only one.
        """
        return not self.stream_k and (self.tile_n == 256 or self.producer is Producer.ALL)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field by name."""
        return {k: v.value if isinstance(v, StrEnum) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            Unsupported: an unknown field or a value of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise Unsupported(f"kernel config has unknown field(s) {', '.join(unknown)}; known are {', '.join(known)}")
        values = dict(fields)
        for name, value in fields.items():
            if name == "producer":
                if value not in list(Producer):
                    raise Unsupported(f"kernel config producer is {value!r}; known are {', '.join(Producer)}")
                values[name] = Producer(value)
            elif isinstance(known[name].default, bool):
                if not isinstance(value, bool):
                    raise Unsupported(f"kernel config {name} is {value!r}; true or false is needed")
            elif not isinstance(value, int) or isinstance(value, bool):
                raise Unsupported(f"kernel config {name} is {value!r}; a whole number is needed")
        return cls(**values)

    def runtime_fields(self) -> dict[str, Any]:
        """The fields that are kernel arguments rather than compiled in."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("runtime")}

    def compiled(self) -> Self:
        """This config with every runtime field at its default: equal for equal binaries."""
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self) if f.metadata.get("runtime")}
        return dataclasses.replace(self, **defaults)


_SHOWN = {"tile_m", "tile_n", "tile_k", "cluster_m", "stages", "producer", "stream_k", "raster_group"}
"""Fields of a configuration that config_text always tells."""


def config_text(op: Op, config: KernelConfig | dict[str, Any]) -> str:
    """A configuration in one word group, for example ``128x256x64 cluster 2 stages 4 warpgroup stream-k group 8``."""
    if not op.multiplies:
        return "-"
    c = config if isinstance(config, KernelConfig) else KernelConfig.from_dict(dict(config))
    split = " stream-k" if c.stream_k else ""
    tile = f"{c.tile_m}x{c.tile_n}x{c.tile_k}"
    text = f"{tile} cluster {c.cluster_m} stages {c.stages} {c.producer.value}{split} group {c.raster_group}"
    # Whatever else a configuration has is named where it is unusual.
    for each in dataclasses.fields(c):
        value = getattr(c, each.name)
        if each.name not in _SHOWN and value != each.default:
            text += f" {each.name.replace('_', '-')}" + ("" if value is True else f" {value}")
    return text


_PRODUCER_MARK = {Producer.WARPGROUP: "wg", Producer.THREAD: "th", Producer.ALL: "all"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One binary: a family, a configuration and the architecture it is compiled for."""

    family: Family
    config: KernelConfig
    arch: str = "sm_90a"
    """What NVRTC is told; which kernel family it is follows from it."""

    @property
    def instructions(self) -> Instructions:
        return instructions_of(self.arch)

    @property
    def name(self) -> str:
        """Readable and unique per binary, usable as a file name."""
        if not self.family.op.multiplies:
            return f"{self.family.name}_{self.arch}"
        c = self.config
        return (
            f"{self.family.name}_{self.arch}_{c.tile_m}x{c.tile_n}x{c.tile_k}"
            f"_c{c.cluster_m}_s{c.stages}_{_PRODUCER_MARK[c.producer]}{'_sk' * c.stream_k}"
        )

    @property
    def digest(self) -> str:
        """Short SHA-256 of everything compiled in, stable across processes and versions."""
        fields = {
            "family": {k: str(v) for k, v in dataclasses.asdict(self.family).items()},
            "config": self.config.compiled().to_dict(),
            "arch": self.arch,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
