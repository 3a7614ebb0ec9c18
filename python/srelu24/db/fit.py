"""How good the cost model is for the trials of a GPU, and constants that are better: for a GPU it was not fitted to."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from srelu24 import whole_file
from srelu24.db.records import Trial, TuningRecord
from srelu24_gen import cost, space, untrusted
from srelu24_gen.cost import Constants
from srelu24_gen.errors import RecordError, Srelu24Error, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import WIDE_TYPES, DType, Family, KernelConfig, Problem, Producer
from srelu24_gen.target import GpuTarget, target_by_key

_ANY = Shape(64, 64, 64)
FAMILIES: dict[str, Family] = {
    problem.family.name: problem.family
    for problem in (
        *(problem for dtype in WIDE_TYPES for problem in (*_ANY.gemms(dtype), *_ANY.dense_gemms(dtype))),
        *_ANY.gemms(DType.E4M3),
    )
}
"""What the model is fitted to, by name."""
KEPT = ("clock_share", "static_watts", "l2_share")
"""Constants that the fit leaves alone: the first two only scale others, and the last one makes steps."""
FIELDS = ("tile_m", "tile_n", "cluster_m", "producer", "stream_k", "raster_group")
"""Of a configuration in a file of trials; the rest follows from them."""


class Timed(NamedTuple):
    """A configuration that ran: its time in microseconds, and its speed beside the others of its problem."""

    config: KernelConfig
    us: float
    speed: float


Trials = dict[Problem, list[Timed]]


class Quality(NamedTuple):
    """How right the model is. All but ``problems`` are in natural logarithms, so about shares.

    Attributes:
        problems: with trials.
        rms: of predicted over measured times.
        bias: their mean.
        behind: by how much the configuration that the model ranks first is slower than the fastest that was tried, in
            the mean over problems of which several were...
        worst: ...and at most.
    """

    problems: int
    rms: float
    bias: float
    behind: float
    worst: float

    @property
    def loss(self) -> float:
        """What a fit makes small: right rankings count before right times."""
        return 2 * self.rms + abs(self.bias) + 8 * self.behind + self.worst


def of_store(trials: Iterable[Trial], target: GpuTarget) -> Trials:
    """What a tuning store knows of single GEMMs on ``target``. Of several trials of a configuration the one with most
    samples counts, and of these the last."""
    best: dict[Problem, dict[KernelConfig, tuple[int, Timed]]] = defaultdict(dict)
    for trial in trials:
        if trial.outcome != "ok" or trial.then is not None or trial.ms is None or trial.speedup is None:
            continue
        if config := _usable(trial, target):
            known = best[trial.problem]
            if config not in known or trial.samples >= known[config][0]:
                known[config] = trial.samples, Timed(config, 1000 * trial.ms, trial.speedup)
    return {problem: [timed for _, timed in known.values()] for problem, known in best.items()}


def of_records(records: Iterable[TuningRecord], target: GpuTarget) -> Trials:
    """Winners on ``target``, one a problem: they say nothing of rankings, and much of times."""
    usable = ((record, _usable(record, target)) for record in records)
    return {record.problem: [Timed(config, 1000 * record.evidence.ms, 1.0)] for record, config in usable if config}


def read(path: Path) -> tuple[GpuTarget, Trials]:
    """A file that :func:`save` wrote, such as ``docs/measurements/trials_h200.json``.

    Raises:
        RecordError: it is none.
    """
    try:
        content = untrusted.decode(untrusted.read(path), dict[str, Any])
        target, found = target_by_key(content["gpu"]), defaultdict(list)
        for entry in content["problems"]:
            problem = Problem(FAMILIES[entry["family"]], entry["m"], entry["n"], entry["k"])
            for *fields, ms, speed in entry["trials"]:
                if min(problem.m, problem.n, problem.k, ms, speed) <= 0:
                    raise ValueError(f"{problem} has sizes or times that are not positive")
                found[problem].append(Timed(_config(problem, fields, target), 1000 * ms, speed))
        return target, dict(found)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, Srelu24Error) as error:
        raise RecordError(f"{path} holds no trials ({error}); give a file of `srelu24 db fit --save`") from error


def save(trials: Trials, target: GpuTarget, path: Path) -> None:
    """A line a problem: small enough to be kept under version control, and read in a diff.

    Raises:
        RecordError: it cannot be written.
    """
    lines = []
    for problem in sorted(trials, key=lambda p: (p.family.name, p.m, p.n, p.k)):
        sizes = {"family": problem.family.name, "m": problem.m, "n": problem.n, "k": problem.k}
        rows = [[*_fields(t.config), round(t.us / 1000, 5), round(t.speed, 4)] for t in trials[problem]]
        lines.append("  " + json.dumps({**sizes, "trials": sorted(rows)}))
    head = json.dumps({"gpu": target.key, "fields": [*FIELDS, "ms", "times as fast as the default of then"]}, indent=1)
    text = f'{head[:-2]},\n "problems": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    try:
        whole_file.write(path, text.encode())
    except OSError as error:
        raise RecordError(f"{path} cannot be written ({error}); give a file in a folder that can") from error


def quality(trials: Trials, target: GpuTarget, constants: Constants) -> Quality:
    """Of the model with these constants.

    Raises:
        RecordError: there are no trials.
    """
    if not trials:
        raise RecordError("there are no trials of this GPU to fit to; run srelu24 tune on it first")
    errors, behind = [], []
    for problem, tried in trials.items():
        expected = [cost.predict(problem, timed.config, target, constants).us for timed in tried]
        errors += [math.log(us / timed.us) for us, timed in zip(expected, tried, strict=True)]
        if len(tried) > 1:
            first = tried[min(range(len(tried)), key=expected.__getitem__)]
            behind.append(math.log(max(timed.speed for timed in tried) / first.speed))
    rms = math.sqrt(mean(error**2 for error in errors))
    return Quality(len(trials), rms, mean(errors), mean(behind or [0.0]), max(behind, default=0.0))


def fit(
    trials: Trials, target: GpuTarget, start: Constants, steps: int, seed: int = 0
) -> Iterator[tuple[Constants, Quality]]:
    """Random search: every step changes one to three constants, at first by a quarter or so, at the end by a per cent,
    and is kept if the model is better for it. Yields the best so far after every step."""
    draw = random.Random(seed)
    names = [field.name for field in dataclasses.fields(Constants) if field.name not in KEPT]
    best, found = start, quality(trials, target, start)
    for step in range(steps):
        width = 0.25 * (1 - step / steps) + 0.01
        some = draw.sample(names, draw.choice((1, 1, 2, 3)))
        changes: dict[str, Any] = {name: getattr(best, name) * math.exp(draw.gauss(0, width)) for name in some}
        tried = dataclasses.replace(best, **changes)
        reached = quality(trials, target, tried)
        if reached.loss < found.loss:
            best, found = tried, reached
        yield best, found


def _usable(row: Trial | TuningRecord, target: GpuTarget) -> KernelConfig | None:
    """The configuration, where the model speaks for the problem and this version knows it."""
    if row.gpu != target.key or row.family.name not in FAMILIES:
        return None
    try:
        config = row.kernel_config()
    except Unsupported:
        return None
    return config if space.supports(row.problem, config, target).ok else None


def _fields(config: KernelConfig) -> list[Any]:
    values = (getattr(config, name) for name in FIELDS)
    return [value.value if isinstance(value, Producer) else value for value in values]


def _config(problem: Problem, fields: list[Any], target: GpuTarget) -> KernelConfig:
    named = dict(zip(FIELDS, fields, strict=True))
    named["producer"] = Producer(named["producer"])
    return _deepest(problem.family, KernelConfig(**named, tile_k=128 // problem.family.dtype.bytes), target)


@functools.cache
def _deepest(family: Family, config: KernelConfig, target: GpuTarget) -> KernelConfig:
    return dataclasses.replace(config, stages=space.max_stages(family, config, target))
