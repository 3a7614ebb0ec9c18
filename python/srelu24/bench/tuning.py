"""What tuning is worth, and what it costs: tuned kernels against the defaults, winners of other token counts against
their own, and the time that a search takes.

The GEMMs of a pass are timed chained, as the tuner times them, on any :class:`~srelu24.tuning.search.Runner`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from srelu24.bench.forward import BenchEvent
from srelu24.bench.results import BenchFile, Candidate, Row
from srelu24.db.choice import answer
from srelu24.db.database import Database
from srelu24.tuning.noise import Chain, speedup
from srelu24.tuning.search import Runner
from srelu24.tuning.tuner import BorrowedRunner, tune_ffn
from srelu24.tuning.worker import Candidate as Chained
from srelu24.tuning.worker import Failed, Job, Step, Timed
from srelu24_gen import cost
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import DType, KernelSpec, Problem, config_text

MIN_ROUNDS = 16


def bench_tuning(
    shapes: Sequence[Shape],
    held_out: Sequence[Shape],
    dtype: DType,
    runner: Runner,
    *,
    which: Pass = Pass.FORWARD,
    density: float = 0.1,
    seconds_per_shape: float = 3.0,
    tune_s: float = 30.0,
    db: Database | None = None,
    env: dict[str, Any] | None = None,
    json_path: Path | None = None,
    on_event: Callable[[BenchEvent], None] = lambda event: None,
) -> BenchFile:
    """Rows "tuning": the recorded kernels ("srelu24") against "default". Rows "fallback": what runs by the records of
    other token counts ("srelu24") against those that are "tuned" now for this one, in a database that is thrown away.
    Of a training step "tuning_step" and "fallback_step". Notes name the kernels; what both have is timed once.

    Args:
        shapes: with a record each on this GPU.
        held_out: without one; each is tuned for ``tune_s`` seconds.
        runner: is closed at the end.
        env: of :func:`srelu24.measuring.machine.environment`.
        json_path: result file, written anew after every row.

    Raises:
        Unsupported: a shape has no record, or a held-out one has.
    """
    db = db or Database.open()
    file = BenchFile(env=env or {}, rows=[])
    try:
        every = [(shape, shape.gemms_of(which, dtype)) for shape in (*shapes, *held_out)]
        recorded = [
            _configs_by_records(gemms, runner, db, exact=number < len(shapes))
            for number, (_, gemms) in enumerate(every)
        ]
        defaults = [tuple(cost.best(problem, runner.target) for problem in gemms) for _, gemms in every]
        _build(runner, [gemms for _, gemms in every] * 2, [*recorded, *defaults])
        for number, ((shape, gemms), ours, default) in enumerate(zip(every, recorded, defaults, strict=True)):
            held = number >= len(shapes)
            other = _tune_aside(shape, which, dtype, runner, db, density, tune_s) if held else default
            op, name = ("fallback", "tuned") if held else ("tuning", "default")
            op += _suffix(which)
            row = _compare(op, name, shape, gemms, runner, ours, other, density, seconds_per_shape)
            file.rows.append(row)
            if json_path is not None:
                file.save(json_path)
            fraction = (number + 1) / (len(shapes) + len(held_out))
            on_event(BenchEvent("row", f"{op} {shape}: {row.speedup}", fraction, row))
    finally:
        runner.close()
    return file


def bench_search(
    shapes: Sequence[Shape],
    dtype: DType,
    make_runner: Callable[[], Runner],
    *,
    which: Pass = Pass.FORWARD,
    density: float = 0.1,
    budgets_s: tuple[float, float] = (60.0, 20.0),
    env: dict[str, Any] | None = None,
    json_path: Path | None = None,
    on_event: Callable[[BenchEvent], None] = lambda event: None,
) -> BenchFile:
    """Rows "search", or "search_step": time on the clock to tune a shape, without a record of any kind.

    Once "from_nothing", with no kernel built, then once more "warm", with what that built; ``ms`` is all that the user
    waits for, ``samples`` counts the candidates timed, ``speedup`` is that of the winners over the defaults.

    Args:
        budgets_s: of the search from nothing, and of the warm one.
        env, json_path: as of :func:`bench_tuning`.
    """
    file = BenchFile(env=env or {}, rows=[])
    for number, shape in enumerate(shapes):
        op = "search" + _suffix(which)
        row = Row(op=op, dtype=dtype.value, shape=str(shape), density=density, candidates={}, speedup={})
        with tempfile.TemporaryDirectory() as folder, _build_cache(Path(folder) / "cache"):
            for name, budget in zip(("from_nothing", "warm"), budgets_s, strict=True):
                runner, db = make_runner(), Database(Path(folder) / "none", Path(folder) / f"{name}.sqlite")
                begin = runner.now()
                report = tune_ffn(*shape, dtype, which=which, density=density, budget_s=budget, db=db, runner=runner)
                row.candidates[name] = Candidate(
                    ms=1000 * (runner.now() - begin),
                    tflops=None,
                    joules=None,
                    sm_mhz=None,
                    watts=None,
                    samples=report.tried,
                    note=f"a budget of {budget:g} s",
                )
                row.speedup[name] = report.speedup
        file.rows.append(row)
        if json_path is not None:
            file.save(json_path)
        on_event(BenchEvent("row", f"{op} {shape}: {row.speedup}", (number + 1) / len(shapes), row))
    return file


def _suffix(which: Pass) -> str:
    return "_step" if which is Pass.BACKWARD else ""


@contextmanager
def _build_cache(folder: Path) -> Iterator[None]:
    """Another build cache for this process and those that it starts."""
    before = os.environ.get("SRELU24_CACHE_DIR")
    os.environ["SRELU24_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SRELU24_CACHE_DIR"]
        else:
            os.environ["SRELU24_CACHE_DIR"] = before


def summary(rows: Sequence[Row]) -> dict[str, tuple[float, float, str]]:
    """By op, over all rows with a time: geometric mean and worst of the speed-up, and the shape of the worst."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for ratio in row.speedup.values():
            found.setdefault(row.op, []).append((ratio, row.shape))
    return {op: (geometric_mean(r for r, _ in ratios), *min(ratios)) for op, ratios in found.items()}


def _build(runner: Runner, gemms: Sequence[Sequence[Problem]], chains: Sequence[Chain]) -> None:
    """Compiles what will be timed, on all cores; a kernel that does not compile fails when it is timed."""
    specs = {
        KernelSpec(problem.family, config, runner.target.arch)
        for problems, chain in zip(gemms, chains, strict=True)
        for problem, config in zip(problems, chain, strict=True)
    }
    for _ in runner.build(sorted(specs, key=lambda spec: spec.name)):
        pass


def _configs_by_records(gemms: Sequence[Problem], runner: Runner, db: Database, exact: bool) -> Chain:
    """The configurations that a call would run by the records; ``exact``: whether each GEMM has a record of its own."""
    configs = []
    for problem in gemms:
        choice = answer(problem, runner.target, db)
        if (choice.source == "exact") != exact:
            found, advice = ("no record", "tune it first") if exact else ("one", "hold out another number of tokens")
            raise Unsupported(f"{problem} has {found} on {runner.target.name}; {advice}")
        configs.append(choice.config)
    return tuple(configs)


def _tune_aside(
    shape: Shape, which: Pass, dtype: DType, runner: Runner, db: Database, density: float, seconds: float
) -> Chain:
    with tempfile.TemporaryDirectory() as folder:
        aside = Database(db.shipped_folder, Path(folder) / "tuning.sqlite")
        aside.take(db.user_records())
        runner = BorrowedRunner(runner)
        report = tune_ffn(*shape, dtype, which=which, density=density, budget_s=seconds, db=aside, runner=runner)
    return tuple(record.kernel_config() for record in report.records)


def _compare(
    op: str,
    name: str,
    shape: Shape,
    gemms: Sequence[Problem],
    runner: Runner,
    ours: Chain,
    other: Chain,
    density: float,
    seconds: float,
) -> Row:
    chains = {"srelu24": ours, name: other} if ours != other else {"srelu24": ours}
    candidates = tuple(Chained(each, tuple(map(Step, gemms, chain))) for each, chain in chains.items())
    job = Job(candidates, density, seconds, MIN_ROUNDS, check="small", arch=runner.target.arch)
    timed: dict[str, Timed] = {}
    errors: dict[str, str] = {}
    for outcome in runner.run(job):
        if isinstance(outcome, Timed):
            timed[outcome.name] = outcome
        elif isinstance(outcome, Failed):
            errors[outcome.name] = outcome.reason
    if ours == other and "srelu24" in timed:
        timed[name] = timed["srelu24"]
    flops = sum(p.flops for p in gemms)
    row = Row(
        op=op,
        dtype=gemms[0].family.dtype.value,
        shape=str(shape),
        density=density,
        candidates={each: _candidate(timed.get(each), errors.get(each, ""), flops) for each in ("srelu24", name)},
        speedup={},
    )
    if len(timed) == 2:
        row.speedup[name] = speedup(timed[name].samples, timed["srelu24"].samples).median
    for each, chain in (("srelu24", ours), (name, other)):
        row.candidates[each].note = "; ".join(
            f"{problem.family.op.value} {config_text(problem.family.op, config)}"
            for problem, config in zip(gemms, chain, strict=True)
        )
    return row


def _candidate(timed: Timed | None, error: str, flops: int) -> Candidate:
    if timed is None:
        return Candidate(ms=None, tflops=None, joules=None, sm_mhz=None, watts=None, samples=0, error=error)
    found = Candidate(
        ms=timed.ms,
        tflops=flops / timed.ms / 1e9,
        joules=None if timed.watts is None else timed.watts * timed.ms / 1000,
        sm_mhz=timed.sm_mhz,
        watts=timed.watts,
        samples=len(timed.samples),
    )
    if timed.throttled:
        found.throttled = True
    return found
