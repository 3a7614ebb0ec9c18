"""The kernels of a shape: which there are, which one would be used, what is built and recorded; and building them.

Needs no GPU, and no torch: without torch the default configurations are chosen, not the recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from srelu24 import db
from srelu24.records import TuningRecord
from srelu24_gen import compile as compiler
from srelu24_gen import cost, paths, space
from srelu24_gen.bindings import footprint
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Pass
from srelu24_gen.models import Shape as Shape
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget


@dataclass(frozen=True, slots=True)
class Chosen:
    """The configuration a problem would run with, and where it comes from (the sources of dispatch.choose)."""

    problem: Problem
    config: KernelConfig
    source: str

    def spec(self, target: GpuTarget) -> KernelSpec:
        return KernelSpec(self.problem.family, self.config, target.arch)


def all_problems(shape: Shape, dtype: DType) -> list[Problem]:
    """The two GEMMs of an FFN, and the kernels of its dense and its unfused form."""
    sparsify = Problem(Family(Op.SPARSIFY24, dtype, Activation.RELU2), shape.m, shape.f)
    return [*shape.gemms(dtype), *shape.dense_gemms(dtype), sparsify]


def choose(problem: Problem, target: GpuTarget) -> Chosen:
    """What a call on this GPU would run; raises Unsupported with the reason where no kernel fits."""
    try:
        from srelu24 import dispatch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return Chosen(problem, cost.best(problem, target), "default")
    choice = dispatch.choose(problem, target)
    return Chosen(problem, choice.config, choice.source)


def kernels(shape: Shape, dtype: DType, target: GpuTarget) -> list[dict[str, Any]]:
    """One row per kernel and candidate configuration of a shape, the chosen one marked.

    ``predicted_us`` and ``bound`` are the cost model's (:mod:`srelu24_gen.cost`), by which the tuner ranks.
    "built" means that the cache holds a kernel of that name, perhaps from templates that have changed since.

    Raises:
        Unsupported: no kernel computes the shape on this target; the message is the reason.
    """
    built = {entry.name for entry in compiler.BuildStore(paths.cache_dir()).entries()}
    recorded = {(r.family, r.m, r.n, r.k, r.kernel_config()) for r in _readable_records(target)}
    rows = []
    for problem in all_problems(shape, dtype):
        chosen = choose(problem, target)
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
    for record in db.Database.open().records():
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
) -> list[KernelSpec]:
    """The binaries that shapes need, each once: those of the sparse FFN that would run, or all that tuning may time and
    then choose from.

    In e4m3 those of every recipe; there is no dense FFN. Of a training step the GEMMs.
    """
    found: dict[str, KernelSpec] = {}
    for shape in shapes:
        problems = [problem for which in passes for problem in shape.gemms_of(which, dtype)]
        if Pass.FORWARD in passes and dtype is DType.E4M3:
            problems += shape.recipe_kernels()
        elif Pass.FORWARD in passes and every_candidate:
            problems += shape.dense_gemms(dtype)
        for problem in problems:
            configs = [choose(problem, target).config]
            if every_candidate and problem.family.op is not Op.GEMM:  # dense GEMMs are timed as they would run
                configs += space.candidates(problem, target)
            for config in configs:
                spec = KernelSpec(problem.family, config, target.arch)
                found.setdefault(spec.digest, spec)
    return list(found.values())


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
    }
