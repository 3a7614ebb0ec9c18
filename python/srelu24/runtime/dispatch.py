"""Which kernel answers a problem on a GPU, whether an FFN runs sparse or dense, and where that choice comes from."""

from __future__ import annotations

import dataclasses
import functools

import torch

from srelu24.db.choice import Choice, FfnChoice, answer, answer_ffn
from srelu24.db.database import Database
from srelu24.numerics.dtypes import DTYPES
from srelu24.runtime import device as limits
from srelu24.runtime.fallback import Reason
from srelu24.runtime.gemm import GemmLauncher
from srelu24.runtime.launch import Launcher, launcher_for
from srelu24.runtime.pair import Pair
from srelu24_gen import compile as compiler
from srelu24_gen import space
from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType, Family, KernelSpec, Op, Problem, pruning_op
from srelu24_gen.target import SYSTEM_SHARED_BYTES, GpuTarget, Toolchain, target_for_device

_CACHED_CHOICES = 8192
"""How many choices are kept: a process needs one for each family and number of tokens that it meets."""

MODES = ("auto", "sparse", "dense")
"""What a caller of an FFN may ask for."""
BATCH = "batch"
"""The mode of an FFN whose results must be batch-invariant: sparse, with batch-invariant configurations."""


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
        dram_gbps=limits.dram_gbps(device),
        watts=limits.watts(device),
        clock_mhz=limits.clock_mhz(device),
    )


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def choose(problem: Problem, target: GpuTarget, batch: bool = False) -> Choice:
    """The best known configuration: :func:`srelu24.db.choice.answer`, from the database at its usual places.

    Args:
        batch: whether the configuration has to be batch-invariant; then it is the one most like the best.

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
def choose_ffn(
    shape: Shape, dtype: DType, b1: bool, b2: bool, target: GpuTarget, activation: Activation = Activation.RELU2
) -> FfnChoice:
    """Whether the FFN runs sparse or dense: :func:`srelu24.db.choice.answer_ffn`, from the database at its usual
    places.

    Raises:
        Unsupported: no kernel computes the sparse pair on ``target``; the message is the reason.
    """
    return answer_ffn(shape, dtype, b1, b2, target, _database(), activation)


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def ffn_way(
    mode: str,
    dtype: torch.dtype,
    b1: bool,
    b2: bool,
    m: int,
    d: int,
    f: int,
    device: torch.device,
    activation: str = Activation.RELU2,
) -> str:
    """How a call runs in mode "auto" or "dense", by the names of ``dense.WAYS`` or SPARSE. Once it is known this is one
    dictionary look-up.

    Raises:
        Unsupported: no kernel computes the sparse pair.
    """
    choice = choose_ffn(Shape(m, d, f), DTYPES[dtype], b1, b2, gpu_of(device), Activation(activation))
    return choice.way if mode == "auto" else choice.dense_way


@functools.cache
def compiles() -> bool:
    """Whether this machine has a compiler; one without has the kernels of bundles only."""
    try:
        return bool(Toolchain.find().include_dirs)
    except ToolchainError:
        return False


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def missing(spec: KernelSpec) -> Reason | None:
    """Why this machine neither has nor can compile a kernel; None where it has or can."""
    reason = compiler.why_missing(spec)
    # Which configuration is chosen, and so the kernel's name, may depend on the number of tokens.
    return None if reason is None else Reason(reason, kind=reason.replace(spec.name, spec.family.name))


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
    """The loaded kernel that answers a call. Once it is known this is one dictionary look-up.

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
    dtype: torch.dtype,
    b1: bool,
    b2: bool,
    m: int,
    d: int,
    f: int,
    device: torch.device,
    batch: bool = False,
    activation: str = Activation.RELU2,
) -> Pair:
    """Both kernels of an FFN that runs sparse. Once they are known this is one dictionary look-up.

    Raises:
        Unsupported, ToolchainError, CompileError, LaunchError: as of :func:`launcher_of`.
    """
    applied = Activation(activation)
    first = launcher_of(family_of(pruning_op(applied), dtype, applied, b1), m, f, d, device, batch)
    second = launcher_of(family_of(Op.SPGEMM, dtype, bias=b2), m, d, f, device, batch)
    assert isinstance(first, GemmLauncher)
    assert isinstance(second, GemmLauncher)
    return Pair(first, second, Shape(m, d, f), dtype, device)


def clear_cache() -> None:
    """Forget every choice, so that new tuning records and bundles count. Kernels already loaded stay loaded."""
    # In this order: each cache is made from those before it, so that a call of another thread in between cannot fill
    # it from one that still has the old records.
    for cached in (_database, choose, choose_ffn, ffn_way, compiles, missing, launcher_of, pair_of):
        cached.cache_clear()


@functools.cache
def _database() -> Database:
    return Database.open()
