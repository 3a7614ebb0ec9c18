"""Which kernel answers a problem on a GPU, whether an FFN runs sparse or dense, and where that choice comes from."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from srelu24.db import Database, Match
from srelu24.launch import DTYPES, GemmLauncher, Launcher, launcher_for
from srelu24.pair import Pair
from srelu24.records import TuningRecord
from srelu24_gen import cost, space
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, instructions_of
from srelu24_gen.target import SYSTEM_SHARED_BYTES, GpuTarget, target_for_device

_CACHED_CHOICES = 8192
"""Problems remembered: one per family and number of tokens that a process meets."""

_HOW = {
    "exact": "tuned for this very problem on this GPU",
    "nearest": "tuned on this GPU for the nearest known problem",
    "other_gpu": "tuned on another GPU of this architecture",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration for a problem.

    Attributes:
        source: "exact", "nearest", "other_gpu" (from ``record``) or "default" (no record helps).
        why: one phrase for people.
    """

    config: KernelConfig
    source: str
    record: TuningRecord | None
    why: str


MODES = ("auto", "sparse", "dense")
"""What a caller of an FFN may ask for."""
BATCH = "batch"
"""How an FFN runs for which batch-invariance is asked: sparse, with batch-invariant configurations."""
SPARSE = "sparse"
"""The way of an FFN that prunes; the others are :data:`srelu24.dense.WAYS`."""
MARGIN = 1.02
"""The sparse pair runs where it was measured to be so many times faster than the best dense FFN of the same sizes."""
MISFIT = 1.05
"""A record of another problem does not count where the cost model expects its own first choice to be so many times
faster: where a tile fits those rows and not these. What the model is wrong by is less (docs/tuning.md)."""
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
    """The best known configuration: the tuning database's answer, else :func:`srelu24_gen.cost.best`, where there is
    none or a neighbour's does not fit (:data:`MISFIT`).

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


def answer(problem: Problem, target: GpuTarget, db: Database) -> Choice:
    """What :func:`choose` says, from a database of the caller's.

    Raises:
        Unsupported: no kernel computes the problem on ``target``; the message is the reason.
    """
    match = db.find(problem, target)
    if match is None:
        default = cost.best(problem, target)
        return Choice(default, "default", None, "default for this size, untuned: no record helps")
    if match.how == "exact":
        return Choice(match.config, match.how, match.record, _HOW[match.how])
    if (gain := _misfit(problem, match, target)) >= MISFIT:
        why = f"default for this size, untuned: expected at {gain:.2f}x of what is tuned for {match.record.problem}"
        return Choice(cost.best(problem, target), "default", None, why)
    return Choice(match.config, match.how, match.record, f"{_HOW[match.how]} ({match.record.problem})")


def _misfit(problem: Problem, match: Match, target: GpuTarget) -> float:
    """How many times faster than a neighbour's configuration the cost model expects its own first choice to be here,
    beyond what it expects, wrongly, where that configuration was measured to be the best. 1 where it says nothing."""
    if not cost.speaks_for(problem, target):
        return 1.0

    def expected(at: Problem) -> float:
        return cost.cost(at, match.config, target).us / cost.cost(at, cost.best(at, target), target).us

    here = dataclasses.replace(problem, m=cost.rounded(problem.m))
    return expected(here) / expected(dataclasses.replace(match.record.problem, family=problem.family))


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
        CompileError, LaunchError: the kernel could not be built or loaded.
    """
    target = gpu_of(device)
    choice = choose(Problem(family, m, n, k), target, batch)
    return launcher_for(KernelSpec(family, choice.config, target.arch), device.index)


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def pair_of(
    dtype: torch.dtype, b1: bool, b2: bool, m: int, d: int, f: int, device: torch.device, batch: bool = False
) -> Pair:
    """What answers an FFN that runs sparse: one dictionary look-up once it is known.

    Raises:
        Unsupported, CompileError, LaunchError: as of :func:`launcher_of`.
    """
    first = launcher_of(family_of(Op.GEMM_RELU2_24, dtype, Activation.RELU2, b1), m, f, d, device, batch)
    second = launcher_of(family_of(Op.SPGEMM, dtype, bias=b2), m, d, f, device, batch)
    assert isinstance(first, GemmLauncher)
    assert isinstance(second, GemmLauncher)
    return Pair(first, second, Shape(m, d, f), dtype, device)


def clear_cache() -> None:
    """Forget every choice, so that new tuning records count. Kernels already loaded stay loaded."""
    # What others are made from comes first: a call of another thread in between keeps nothing of what was.
    for cached in (_database, choose, choose_ffn, ffn_way, launcher_of, pair_of):
        cached.cache_clear()


@functools.cache
def _database() -> Database:
    return Database.open()
