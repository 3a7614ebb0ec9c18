"""What takes long, shown while it runs: searches with what they find, and benchmarks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape
from rich.progress import Progress, TaskID

from srelu24.cli import views
from srelu24.tuning.events import (
    Advanced,
    Event,
    Failure,
    Finished,
    ShapeEnded,
    ShapeStarted,
    StageStarted,
    TuneReport,
)
from srelu24_gen.models import Pass, Shape
from srelu24_gen.spec import Activation, DType, config_text

if TYPE_CHECKING:
    from srelu24.bench.results import BenchFile


@contextlib.contextmanager
def live_view() -> Iterator[Callable[[Event], None]]:
    """A progress view on stderr: a bar per stage and problem, the best so far, failures as they come, the result."""
    with views.progress() as progress:
        yield _LiveView(progress).show


class _LiveView:
    """The bars of one or several searches."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stages: dict[tuple[str, str], TaskID] = {}
        self._gpus: dict[str, TaskID] = {}
        self._failed: Counter[tuple[str, str]] = Counter()

    def show(self, event: Event) -> None:
        """Draw what has happened."""
        match event:
            case ShapeStarted():
                self._begin_shape(event)
            case ShapeEnded():
                self._end_shape(event)
            case StageStarted():
                title = escape(f"{event.stage} {event.what}")
                self._stages[event.stage, event.what] = self._progress.add_task(title, total=event.total)
            case Advanced():
                self._advance(event)
            case Failure():
                self._failed[event.stage, event.what] += 1
                self._print(f"failed: {event.what}, {event.config}: {event.reason}", "yellow")
            case Finished():
                for line in summary(event.report):
                    self._print(line)

    def _begin_shape(self, event: ShapeStarted) -> None:
        if event.gpu not in self._gpus:
            self._gpus[event.gpu] = self._progress.add_task("", total=event.total)
        title = f"{event.number} of {event.total} on {event.gpu}: {event.shape} {event.which}"
        description = escape(f"{title}, {event.seconds:.0f} s; about {event.left_s:.0f} s left")
        self._progress.update(self._gpus[event.gpu], completed=event.number - 1, description=description)

    def _end_shape(self, event: ShapeEnded) -> None:
        m, d, f = event.shape
        for stage, what in list(self._stages):
            if any(sizes in what for sizes in (f"{m}x{d}x{f}", f"{m}x{f}x{d}", f"{f}x{d}x{m}")):
                self._progress.remove_task(self._stages.pop((stage, what)))
        self._progress.advance(self._gpus[event.gpu])
        if event.error:
            self._print(f"failed: {event.shape} {event.which}: {event.error}", "bold red")
        elif event.report is None:
            self._print(f"{event.shape} {event.which} is tuned on {event.gpu} already")

    def _advance(self, event: Advanced) -> None:
        task = self._stages.get((event.stage, event.what))
        if task is None:
            return
        best = f"  best {event.speedup:.3f}x {event.best}" if event.best else ""
        failed = f"  {count} failed" if (count := self._failed[event.stage, event.what]) else ""
        description = escape(f"{event.stage} {event.what}{best}{failed}")
        self._progress.update(task, completed=event.done, description=description)

    def _print(self, text: str, style: str = "") -> None:
        self._progress.console.print(escape(text), style=style, soft_wrap=True)


def summary(report: TuneReport) -> list[str]:
    """The result in words, a line per kernel and one for the whole."""
    lines = []
    for record in report.records:
        config, evidence = config_text(record.family.op, record.config), record.evidence
        lines.append(f"{record}: {config}, {evidence.ms:.3f} ms (default {evidence.default_ms:.3f} ms)")
    verdict = "nothing beats the default beyond noise" if report.kept_default else f"{report.speedup:.3f}x the default"
    counts = f"{report.tried} timed, {report.resumed} taken over, {len(report.failures)} failed"
    lines.append(f"Chained {report.pair_ms:.3f} ms: {verdict}.")
    if best := report.records[0].evidence.best_dense:
        way, dense = best
        lines.append(f"Dense at best {dense.ms:.3f} ms ({way}): the sparse pair is {dense.speedup:.3f}x as fast.")
    if report.records[0].evidence.throttled:
        lines.append("The GPU was throttled by heat or a power brake meanwhile: tune again when it is cool.")
    lines.append(f"{counts}, {report.skipped} not reached, in {report.seconds:.0f} s.")
    return lines


def benchmark(
    what: Literal["ffn", "gemm", "sweep", "fp8"],
    shapes: list[Shape],
    dtype: DType,
    densities: list[float],
    path: Path | None,
    seconds: float | None = None,
    *,
    zeros: bool = False,
    activation: Activation = Activation.RELU2,
) -> None:
    """Times the FFN, each kernel alone, what is chosen, or the 8-bit FFN against its peers; prints and writes a table.

    Args:
        seconds: of timing per shape and density, where the benchmark's own is not wanted.
        zeros: for "gemm", on nothing but zeros as well.
        activation: for "ffn" and "gemm", between the layers.
    """
    from srelu24.bench import forward

    with views.progress() as bar:
        task = bar.add_task("benchmark", total=1.0)

        def on_event(event: forward.BenchEvent) -> None:
            bar.update(task, completed=event.fraction, description=event.text)
            if event.kind == "failed":
                views.note(event.text, "yellow")

        benchmarks: dict[str, Callable[..., BenchFile]] = {
            "ffn": partial(forward.bench_ffn, activation=activation),
            "gemm": partial(forward.bench_gemm, zeros=zeros, activation=activation),
            "sweep": forward.bench_sweep,
            "fp8": lambda shapes, _, densities, **options: forward.bench_fp8(shapes, densities, **options),
        }
        own: dict[str, Any] = {} if seconds is None else {"seconds_per_shape": seconds}
        file = benchmarks[what](shapes, dtype, densities, json_path=path, on_event=on_event, **own)
    views.show(views.bench_table(file.rows))
    if path:
        views.note(f"written to {path}")


def benchmark_tuning(
    shapes: list[Shape],
    held_out: list[Shape],
    dtype: DType,
    density: float,
    seconds: float,
    tune_s: float,
    path: Path | None,
    which: Pass,
) -> None:
    """Times tuned kernels against the defaults on this GPU; prints the table, writes the file, if named."""
    import torch

    from srelu24.bench import tuning
    from srelu24.measuring import machine
    from srelu24.tuning.tuner import GpuRunner

    device = torch.device("cuda")
    with views.progress() as bar:
        task = bar.add_task("benchmark of tuning", total=1.0)
        file = tuning.bench_tuning(
            shapes,
            held_out,
            dtype,
            GpuRunner(device),
            which=which,
            density=density,
            seconds_per_shape=seconds,
            tune_s=tune_s,
            env=machine.environment(device),
            json_path=path,
            on_event=lambda event: bar.update(task, completed=event.fraction, description=event.text),
        )
    views.show(views.bench_table(file.rows))
    for op, (mean, worst, where) in tuning.summary(file.rows).items():
        views.note(f"{op}: geometric mean {mean:.3f}x, worst {worst:.3f}x ({where})")
    if path:
        views.note(f"written to {path}")


def benchmark_search(
    shapes: list[Shape], dtype: DType, density: float, budgets_s: tuple[float, float], path: Path | None, which: Pass
) -> None:
    """Times searches on this GPU, from nothing and with built kernels; prints the times, writes the file, if named."""
    import torch

    from srelu24.bench import tuning
    from srelu24.bench.results import check_writable
    from srelu24.measuring import machine
    from srelu24.tuning.tuner import GpuRunner

    device = torch.device("cuda")
    runner = partial(GpuRunner, device)
    runner()  # refuses at once where there is no GPU
    check_writable(path)
    file = tuning.bench_search(
        shapes,
        dtype,
        runner,
        which=which,
        density=density,
        budgets_s=budgets_s,
        env=machine.environment(device),
        json_path=path,
        on_event=lambda event: views.note(event.text),
    )
    for row in file.rows:
        for name, search in row.candidates.items():
            views.note(f"{row.shape} {name}: {(search.ms or 0) / 1000:.0f} s, {search.samples} candidates")
    if path:
        views.note(f"written to {path}")
