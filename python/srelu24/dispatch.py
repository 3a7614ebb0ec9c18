"""Which kernel answers a problem on a GPU, whether an FFN runs sparse or dense, and where that choice comes from."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from srelu24.choice import Choice, answer
from srelu24.db import Database
from srelu24.launch import DTYPES, GemmLauncher, Launcher, launcher_for
from srelu24.pair import Pair
from srelu24_gen import compile as compiler
from srelu24_gen import cost, space
from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, KernelSpec, Op, Problem, instructions_of
from srelu24_gen.target import SYSTEM_SHARED_BYTES, GpuTarget, Toolchain, target_for_device

_CACHED_CHOICES = 8192
"""Problems remembered: one per family and number of tokens that a process meets."""

MODES = ("auto", "sparse", "dense")
"""What a caller of an FFN may ask for."""
BATCH = "batch"
"""How an FFN runs for which batch-invariance is asked: sparse, with batch-invariant configurations."""
SPARSE = "sparse"
"""The way of an FFN that prunes; the others are :data:`srelu24.dense.WAYS`."""
MARGIN = 1.02
"""The sparse pair runs where it was measured to be so many times faster than the best dense FFN of the same sizes."""
PREDICTED_MARGIN = 1.1
"""The same where only :func:`srelu24_gen.cost.ffn_gain` says so: dense unless the model leaves no doubt."""


@dataclass(frozen=True, slots=True)
class FfnChoice:
    """Sparse or dense, for an FFN.

    Attributes:
        way: :data:`SPARSE` or one of :data:`srelu24.dense.WAYS`.
        dense_way: what runs where dense is asked for.
        gain: how many times faster the sparse pair is than ``dense_way``, as far as known; 1 where it is not.
        source: "measured" at this very M, "between" two measured M, "scaled" from one by the cost model, "model", or
            "unknown" where no time and no model says anything.
        why: one phrase for people.
    """

    way: str
    dense_way: str
    gain: float
    source: Literal["measured", "between", "scaled", "model", "unknown"]
    why: str


@functools.cache
def gpu_of(device: torch.device) -> GpuTarget:
    """What kernels are made for on a CUDA device.

    Raises:
        Unsupported: not a CUDA device, or no kernel family runs on its architecture.
    """
    if device.type != "cuda":
        raise Unsupported(f"{device} has no kernels; they need a CUDA device.")
    p = torch.cuda.get_device_properties(device)
    return target_for_device(
        p.name,
        (p.major, p.minor),
        p.multi_processor_count,
        smem_per_block=p.shared_memory_per_multiprocessor - SYSTEM_SHARED_BYTES,
        l2_bytes=p.L2_cache_size,
    )


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def choose(problem: Problem, target: GpuTarget, batch: bool = False) -> Choice:
    """The best known configuration: :func:`srelu24.choice.answer`, from the database at its usual places.

    Args:
        batch: the batch-invariant configuration most like it.

    Raises:
        Unsupported: no kernel computes the problem on ``target``; the message is the reason.
    """
    if batch and problem.family.op is not Op.SPARSIFY24:
        choice = choose(problem, target)
        config = space.batch_invariant(problem, choice.config, target)
        if config == choice.config:
            return choice
        return dataclasses.replace(choice, config=config, why=f"{choice.why}; made batch-invariant")
    return answer(problem, target, _database())


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def choose_ffn(shape: Shape, dtype: DType, b1: bool, b2: bool, target: GpuTarget) -> FfnChoice:
    """Whether the FFN runs sparse or dense, by the times that the tuner stored for D and F on this GPU.

    At an M that was measured, those times decide. Between two, the gain is interpolated in log M; above the largest it
    stays, below the smallest it shrinks as the cost model says. Without a time for D and F the cost model decides,
    where it is fitted to the kernels; else it is dense, so that nobody is slower for not having tuned.

    Raises:
        Unsupported: no kernel computes the sparse pair on ``target``; the message is the reason.
    """
    first, second = shape.gemms(dtype, b1, b2)
    for problem in (first, second):
        space.default(problem, target)
    points = []
    for record in _database().of_widths(first, target):
        if best := record.evidence.best_dense:
            points.append((max(record.m, 1), *best))
    if not points and instructions_of(target.arch) is not cost.FITTED:
        why = (
            f"default, untuned: no time of this D and F on this GPU; srelu24 tune --shape {shape} finds what is faster"
        )
        return FfnChoice("cublas", "cublas", 1.0, "unknown", why)
    if not points:
        gain = cost.ffn_gain(shape, dtype, target)
        return _ffn_choice("cublas", gain, "model", "nothing measured for this D and F; the cost model expects")
    m = max(shape.m, 1)
    low = max((p for p in points if p[0] <= m), default=None)
    high = min((p for p in points if p[0] >= m), default=None)
    if low and high and low[0] < high[0]:
        share = math.log(m / low[0]) / math.log(high[0] / low[0])
        gain = low[2].speedup ** (1 - share) * high[2].speedup ** share
        way = (low if share < 0.5 else high)[1]
        return _ffn_choice(way, gain, "between", f"between the times at {low[0]} and {high[0]} tokens:")
    at, way, time = low or high or points[0]
    if at == m:
        return _ffn_choice(way, time.speedup, "measured", "measured:")
    gain = time.speedup
    if at > m:
        here, there = (cost.ffn_gain(Shape(tokens, shape.d, shape.f), dtype, target) for tokens in (m, at))
        gain *= min(1.0, here / there)
    return _ffn_choice(way, gain, "scaled", f"scaled from the time at {at} tokens:")


def _ffn_choice(
    dense_way: str, gain: float, source: Literal["measured", "between", "scaled", "model"], how: str
) -> FfnChoice:
    needed = PREDICTED_MARGIN if source == "model" else MARGIN
    way = SPARSE if gain >= needed else dense_way
    why = f"{how} the sparse pair at {gain:.3f}x of dense {dense_way}'s speed, {needed:g}x is needed"
    return FfnChoice(way, dense_way, gain, source, why)


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def ffn_way(mode: str, dtype: torch.dtype, b1: bool, b2: bool, m: int, d: int, f: int, device: torch.device) -> str:
    """How a call runs in mode "auto" or "dense": one dictionary look-up once it is known.

    Raises:
        Unsupported: no kernel computes the sparse pair.
    """
    choice = choose_ffn(Shape(m, d, f), DTYPES[dtype], b1, b2, gpu_of(device))
    return choice.way if mode == "auto" else choice.dense_way


@functools.cache
def compiles() -> bool:
    """Whether this machine has a compiler; one without has the kernels of bundles only."""
    try:
        return bool(Toolchain.find().include_dirs)
    except ToolchainError:
        return False


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def missing(spec: KernelSpec) -> str | None:
    """Why this machine neither has nor can compile a kernel; None where it is to be had, as with a compiler always."""
    return compiler.why_missing(spec)


@functools.cache
def family_of(
    op: Op,
    dtype: torch.dtype,
    activation: Activation = Activation.NONE,
    bias: bool = False,
    residual: bool = False,
    count_nonzeros: bool = False,
) -> Family:
    """The family of a call on 16-bit operands."""
    return Family(op, DTYPES[dtype], activation, bias, residual, count_nonzeros)


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def launcher_of(family: Family, m: int, n: int, k: int, device: torch.device, batch: bool = False) -> Launcher:
    """The loaded kernel that answers a call: one dictionary look-up once it is known.

    Raises:
        Unsupported: no kernel computes the problem.
        ToolchainError: the kernel is :func:`missing`.
        CompileError, LaunchError: it could not be built or loaded.
    """
    target = gpu_of(device)
    choice = choose(Problem(family, m, n, k), target, batch)
    spec = KernelSpec(family, choice.config, target.arch)
    if (reason := missing(spec)) is not None:
        raise ToolchainError(reason)
    return launcher_for(spec, device.index)


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def pair_of(
    dtype: torch.dtype, b1: bool, b2: bool, m: int, d: int, f: int, device: torch.device, batch: bool = False
) -> Pair:
    """What answers an FFN that runs sparse: one dictionary look-up once it is known.

    Raises:
        Unsupported, ToolchainError, CompileError, LaunchError: as of :func:`launcher_of`.
    """
    first = launcher_of(family_of(Op.GEMM_RELU2_24, dtype, Activation.RELU2, b1), m, f, d, device, batch)
    second = launcher_of(family_of(Op.SPGEMM, dtype, bias=b2), m, d, f, device, batch)
    assert isinstance(first, GemmLauncher)
    assert isinstance(second, GemmLauncher)
    return Pair(first, second, Shape(m, d, f), dtype, device)


def clear_cache() -> None:
    """Forget every choice, so that new tuning records and bundles count. Kernels already loaded stay loaded."""
    # What others are made from comes first: a call of another thread in between keeps nothing of what was.
    for cached in (_database, choose, choose_ffn, ffn_way, compiles, missing, launcher_of, pair_of):
        cached.cache_clear()


@functools.cache
def _database() -> Database:
    return Database.open()
