"""Which kernel answers a problem on a GPU, and where that choice comes from."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from srelu24.db import Database, TuningRecord
from srelu24.launch import DTYPES, Launcher, launcher_for
from srelu24_gen import space
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget, target_for_device

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
        l2_bytes=p.L2_cache_size,
    )


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def choose(problem: Problem, target: GpuTarget) -> Choice:
    """The best known configuration: the tuning database's answer, else the default.

    Raises:
        Unsupported: no kernel computes the problem on ``target``; the message is the reason.
    """
    default = space.default(problem, target)
    match = _database().find(problem, target)
    if match is None:
        return Choice(default, "default", None, "default for this size, untuned: no record helps")
    why = _HOW[match.how]
    if match.how != "exact":
        why += f" ({match.record.problem})"
    return Choice(match.config, match.how, match.record, why)


@functools.lru_cache(maxsize=_CACHED_CHOICES)
def launcher(
    op: Op,
    dtype: torch.dtype,
    activation: Activation,
    bias: bool,
    residual: bool,
    count_nonzeros: bool,
    m: int,
    n: int,
    k: int,
    device: torch.device,
) -> Launcher:
    """The loaded kernel that answers a call: one dictionary look-up once it is known.

    Raises:
        Unsupported: no kernel computes the problem.
        CompileError, LaunchError: the kernel could not be built or loaded.
    """
    family = Family(op, DTYPES[dtype], activation, bias, residual, count_nonzeros)
    target = gpu_of(device)
    choice = choose(Problem(family, m, n, k), target)
    return launcher_for(KernelSpec(family, choice.config, target.arch), device.index)


def clear_cache() -> None:
    """Forget every choice, so that new tuning records count. Kernels already loaded stay loaded."""
    launcher.cache_clear()
    choose.cache_clear()
    _database.cache_clear()


@functools.cache
def _database() -> Database:
    return Database.open()
