"""The kernel space: which configurations are valid for a problem, and which one to start from.

:func:`supports` is the one place that knows; the tuner, the dispatcher and the user's error message
all ask it, and it gives the reason. What only one kernel family knows is in a module of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from srelu24_gen import bindings, families, space_sm80, space_sm90
from srelu24_gen.errors import Unsupported
from srelu24_gen.families import Verdict as Verdict
from srelu24_gen.families import supports_family as supports_family
from srelu24_gen.families import trains as trains
from srelu24_gen.spec import DType, Family, Instructions, KernelConfig, Problem, instructions_of
from srelu24_gen.target import GpuTarget

MAX_EXTENT = 2**31 - 2**16
"""M, N and K are 32-bit in the kernels, with room for the last tile; element counts may be larger."""


class _Space(Protocol):
    """What a kernel family says of itself."""

    def supports_family(self, family: Family, target: GpuTarget) -> Verdict: ...

    def supports_sizes(self, problem: Problem, config: KernelConfig) -> Verdict: ...

    def supports_config(self, family: Family, config: KernelConfig, target: GpuTarget) -> Verdict: ...

    def configs(self, problem: Problem, target: GpuTarget) -> Iterator[KernelConfig]: ...

    def default(self, problem: Problem, target: GpuTarget) -> KernelConfig: ...

    def tiles(self) -> tuple[tuple[int, int], ...]: ...

    def is_timed(self, config: KernelConfig) -> bool: ...

    def batch_invariant(self, config: KernelConfig) -> KernelConfig: ...


_SPACES: dict[Instructions, _Space] = {Instructions.WGMMA: space_sm90, Instructions.MMA_SYNC: space_sm80}


def supports_problem(problem: Problem, target: GpuTarget) -> Verdict:
    """Whether any kernel of the family that ``target`` is for computes ``problem`` on it."""
    family = problem.family
    if problem.m < 0 or problem.n < 1 or (family.op.multiplies and problem.k < 1):
        return Verdict(False, f"sizes {problem.m}x{problem.n}x{problem.k} must be positive (M may be 0)")
    for name, extent in (("M", problem.m), ("N", problem.n), ("K", problem.k)):
        if extent > MAX_EXTENT:
            return Verdict(False, f"{name} = {extent} is above {MAX_EXTENT}; split the problem along {name}")
    step = 16 if DType.E4M3 in (family.dtype, family.out) else 8  # 16 bytes of packed values are twice as many columns
    for name, extent in (("N", problem.n), ("K", problem.k)):
        if extent % step:
            return Verdict(False, f"{name} = {extent} is not a multiple of {step}; pad the layer's width")
    if families.trains(family):
        verdict = families.supports_training_sizes(problem)
        if not verdict.ok:
            return verdict
    verdict = families.supports_family(family)
    return has_kernel(family, target) if verdict.ok else verdict


def supports(problem: Problem, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether ``config`` computes ``problem`` correctly on ``target``, with the reason if not."""
    verdict = supports_problem(problem, target)
    if verdict.ok and problem.family.op.multiplies:
        verdict = _space(target).supports_sizes(problem, config)
    return supports_config(problem.family, config, target) if verdict.ok else verdict


def supports_config(family: Family, config: KernelConfig, target: GpuTarget) -> Verdict:
    """Whether the kernel of ``family`` can be built as ``config`` for ``target``; sizes do not matter."""
    verdict = has_kernel(family, target)
    if not verdict.ok:
        return verdict
    if not family.op.multiplies:
        only = config == KernelConfig()
        return Verdict(True) if only else Verdict(False, f"{family.op.value} has only the default config")
    return _space(target).supports_config(family, config, target)


def max_stages(family: Family, config: KernelConfig, target: GpuTarget) -> int:
    """The deepest useful ring that fits the shared memory of ``target``."""
    return bindings.max_stages(family, config, target.smem_per_block)


def candidates(problem: Problem, target: GpuTarget) -> list[KernelConfig]:
    """Every configuration worth trying, :func:`default` first.

    Raises:
        Unsupported: no kernel computes the problem; the message is the reason.
    """
    found = [default(problem, target)]
    if problem.family.op.multiplies:
        worth = _space(target).configs(problem, target)
        found += [config for config in worth if supports(problem, config, target).ok]
    return list(dict.fromkeys(found))


def batch_invariant(problem: Problem, config: KernelConfig, target: GpuTarget) -> KernelConfig:
    """The batch-invariant configuration most like ``config``, which is valid for ``problem``."""
    whole = _space(target).batch_invariant(config)
    if supports(problem, whole, target).ok:
        return whole
    return dataclasses.replace(default(problem, target), stream_k=False)


def default(problem: Problem, target: GpuTarget) -> KernelConfig:
    """One plain tile. What runs without a record is :func:`srelu24_gen.cost.best`.

    Raises:
        Unsupported: no kernel computes the problem; the message is the reason.
    """
    verdict = supports_problem(problem, target)
    if not verdict.ok:
        raise Unsupported(f"{problem}: {verdict.reason}.")
    if not problem.family.op.multiplies:
        return KernelConfig()
    return _space(target).default(problem, target)


def tiles(target: GpuTarget) -> tuple[tuple[int, int], ...]:
    """Rows and columns of every tile that the kernel family of ``target`` has."""
    return _space(target).tiles()


def is_timed(config: KernelConfig, target: GpuTarget) -> bool:
    """Whether tiles like the configuration's have been timed, so that it may be served without a record of its own."""
    return _space(target).is_timed(config)


def has_kernel(family: Family, target: GpuTarget) -> Verdict:
    """Whether the kernel family of the target's architecture has a kernel of ``family``."""
    try:
        return _space(target).supports_family(family, target)
    except Unsupported as error:
        return Verdict(False, f"{target.name}: {error}")


def _space(target: GpuTarget) -> _Space:
    return _SPACES[instructions_of(target.arch)]
