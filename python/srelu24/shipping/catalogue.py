"""The kernels of a shape: which there are, which one would be used, what is built and recorded; and building them.

Needs no GPU, and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from srelu24.db import database
from srelu24.db.choice import answer
from srelu24.db.records import TuningRecord
from srelu24_gen import compile as compiler
from srelu24_gen import cost, paths, space
from srelu24_gen.bindings import footprint
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Pass
from srelu24_gen.models import Shape as Shape
from srelu24_gen.spec import Activation, DType, Family, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget


def problems(
    shape: Shape,
    dtype: DType,
    passes: Sequence[Pass] = (Pass.FORWARD,),
    *,
    dense: bool = True,
    bias: bool = False,
    activation: Activation = Activation.RELU2,
) -> list[Problem]:
    """What calls of an FFN of this shape launch in these passes, each once.

    Forward: the two GEMMs of the sparse FFN, and the kernels of its dense and its unfused form; in e4m3 those of every
    recipe, on X in bf16 and weights in e4m3. Backward: what a training step launches, dense steps of the warm-up too.

    Args:
        dense: of the forward pass the dense and the unfused form, too.
        bias: with biases, too.
    """
    found: list[Problem] = []
    for b in (False, True)[: 1 + bias]:
        found += [problem for which in passes for problem in shape.gemms_of(which, dtype, b, b, activation)]
        if Pass.FORWARD in passes and dtype is DType.E4M3:
            found += shape.recipe_kernels(b)
        elif Pass.FORWARD in passes and dense:
            found += [*shape.dense_gemms(dtype, b, b, activation), *shape.unfused_kernels(dtype, activation)]
        if Pass.BACKWARD in passes:
            found += shape.step_kernels(dtype, b)
    return list(dict.fromkeys(found))


def kernels(
    shape: Shape, dtype: DType, target: GpuTarget, activation: Activation = Activation.RELU2
) -> list[dict[str, Any]]:
    """One row per kernel and candidate configuration of a shape, the chosen one marked.

    ``predicted_us`` and ``bound`` are the cost model's (:mod:`srelu24_gen.cost`), by which the tuner ranks.
    "built" means that the cache holds a kernel of that name, perhaps from templates that have changed since.

    Raises:
        Unsupported: no kernel computes the shape on this target; the message is the reason.
    """
    built = {entry.name for entry in compiler.BuildStore(paths.cache_dir()).entries()}
    recorded = {(r.family, r.m, r.n, r.k, r.kernel_config()) for r in _readable_records(target)}
    rows, known = [], database.Database.open()
    for problem in problems(shape, dtype, activation=activation):
        chosen = answer(problem, target, known)
        for config in dict.fromkeys([chosen.config, *space.candidates(problem, target)]):
            spec = KernelSpec(problem.family, config, target.arch)
            predicted = cost.cost(problem, config, target)
            rows.append(
                {
                    "shape": str(shape),
                    "gpu": target.key,
                    "op": problem.family.op.value,
                    "family": problem.family.name,
                    "kernel": spec.name,
                    "config": config.to_dict(),
                    "chosen": config == chosen.config,
                    "source": chosen.source if config == chosen.config else None,
                    "built": spec.name in built,
                    "predicted_us": round(predicted.us, 1),
                    "bound": predicted.bound,
                    "recorded": (problem.family, problem.m, problem.n, problem.k, config) in recorded,
                }
            )
    return rows


def _readable_records(target: GpuTarget) -> Iterable[TuningRecord]:
    for record in database.Database.open().records():
        try:
            record.kernel_config()
        except Unsupported:  # written by another version; dispatch warns about it where it matters
            continue
        if record.gpu == target.key:
            yield record


def specs_for(
    shapes: Iterable[Shape],
    dtype: DType,
    target: GpuTarget,
    every_candidate: bool = False,
    passes: Sequence[Pass] = (Pass.FORWARD,),
    bias: bool = False,
    activation: Activation = Activation.RELU2,
) -> list[KernelSpec]:
    """The binaries of :func:`problems` at these very numbers of tokens, each once: those that would run, of the forward
    pass the sparse FFN's; or all that tuning may time and then choose from, and the dense and the unfused form's.

    Raises:
        Unsupported: no kernel computes a shape on ``target``.
    """
    found: dict[str, KernelSpec] = {}
    known = database.Database.open()
    for shape in shapes:
        for problem in problems(shape, dtype, passes, dense=every_candidate, bias=bias, activation=activation):
            configs = [answer(problem, target, known).config]
            if every_candidate and problem.family.op is not Op.GEMM:  # dense GEMMs are timed as they would run
                configs += space.candidates(problem, target)
            for config in configs:
                spec = KernelSpec(problem.family, config, target.arch)
                found.setdefault(spec.digest, spec)
    return list(found.values())


def specs_up_to(problems: Iterable[Problem], target: GpuTarget, known: database.Database) -> list[KernelSpec]:
    """The binaries of these problems at every number of tokens up to the largest of their family and widths, each once;
    of inference in 16 bits the batch-invariant ones, too.

    Raises:
        Unsupported: no kernel computes a problem on ``target``.
    """
    alike: dict[tuple[Family, tuple[int, int]], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.family, problem.widths), []).append(problem)
    found: dict[str, KernelSpec] = {}
    for (family, _), given in alike.items():
        asked_in_batches = (family.op.prunes or family.op is Op.SPGEMM) and not (family.scaled or space.trains(family))
        for problem in _up_to(given):
            configs = [answer(problem, target, known).config]
            if asked_in_batches:
                configs.append(space.batch_invariant(problem, configs[0], target))
            for config in configs:
                spec = KernelSpec(family, config, target.arch)
                found.setdefault(spec.digest, spec)
    return list(found.values())


def _up_to(given: list[Problem]) -> list[Problem]:
    """At which numbers of tokens to ask, so that every answer up to the largest is met: the given ones, where a record
    may hold for them alone, and both ends of every interval in which the cost model and the space say the same. Within
    one of these the answer changes where the nearest record does, from one end's to the other's."""
    largest, step = max(given, key=lambda p: p.tokens), cost.rounded(1)
    least = 16 if space.trains(largest.family) else 1  # a training step takes multiples of 16 tokens
    if not largest.family.op.multiplies:  # one configuration
        return [largest.at(least)]
    ends = {p.tokens for p in given}
    for start in range(0, largest.tokens, step):
        ends |= {start + least, start + step}
    valid = sorted(m for m in ends if m <= largest.tokens and m % least == 0)
    return [largest.at(m) for m in valid] or [largest]


def build_kernels(
    specs: list[KernelSpec], jobs: int | None = None, on_done: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Compiles kernels in parallel; one row each, with what the compiler reports, or with the error.

    ``smem_bytes`` is static and dynamic shared memory per block, ``seconds`` what the compiler took when it was built.
    """
    outcomes = compiler.build_many(specs, jobs=jobs, on_done=lambda spec, outcome: on_done())
    return [_built_row(spec, outcome) for spec, outcome in zip(specs, outcomes, strict=True)]


def _built_row(spec: KernelSpec, result: compiler.Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"name": spec.name, "config": spec.config.to_dict(), "error": None}
    if isinstance(result, Srelu24Error):
        return row | {"error": str(result)}
    meta = result.meta
    dynamic = 0
    if spec.family.op.multiplies:
        dynamic = footprint(spec.family, spec.config).shared_bytes
    return row | {
        "registers": meta.registers,
        "stack_bytes": meta.stack_bytes,
        "spill_bytes": meta.spill_bytes,
        "smem_bytes": meta.static_smem + dynamic,
        "seconds": meta.compile_seconds,
        "from_cache": result.from_cache,
        "folder": str(result.folder) if result.folder else None,
        "warnings": list(meta.warnings),
        "fault": meta.fault,
    }
