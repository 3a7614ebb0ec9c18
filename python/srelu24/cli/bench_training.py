"""``srelu24 bench step`` and ``bench training``: the speed of a training step, and what parts of it are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srelu24.cli import options, views
from srelu24_gen.spec import DType

PAGE = Path("docs/training.md")


def bench_training(
    json: Annotated[Path, typer.Option("--json", metavar="FILE", help="The result file; what it holds is kept.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of every run.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = 3,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Only this one, such as recipe; may be repeated.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Start no run that would end later than this.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A model of seconds, to try the command on a CPU.")] = False,
) -> None:
    """What each part of the training method is worth, on a small transformer; goes on where it was stopped."""
    import torch

    from srelu24.bench.ablation import runs
    from srelu24.bench.ablation.results import Setup
    from srelu24.bench.ablation.variants import Variant

    known = [v.value for v in Variant]
    for name in variant or []:
        if name not in known:
            raise typer.BadParameter(f"there is no variant {name!r}; there are {', '.join(map(repr, known))}")
    small = {"layers": 2, "width": 32, "hidden": 128, "heads": 2, "context": 32, "batch": 4, "validation_batches": 2}
    setup = Setup(
        steps=steps,
        warmup_steps=steps // 10,
        refresh=max(1, steps // 40),
        **(small if tiny else {}),
    )
    runs.ablate(
        setup,
        [Variant(name) for name in variant or known],
        range(seeds),
        path=json,
        device="cuda" if torch.cuda.is_available() and not tiny else "cpu",
        seconds=seconds,
        on_event=views.note,
    )


def report_training(
    json: Annotated[Path, typer.Option("--json", metavar="FILE", exists=True, help="What `bench training` wrote.")],
    results: Annotated[Path, typer.Option(metavar="DIR", exists=True, help="Where the other result files are.")],
    page: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The page to fill.")] = PAGE,
) -> None:
    """Fill the tables of docs/training.md and draw the ablation's plot next to its file."""
    from srelu24.bench.ablation.results import AblationFile
    from srelu24.documents import ablation, pages

    file = AblationFile.load(json)
    pages.refill(page, pages.tables(results) | ablation.tables(file))
    ablation.plot(file, json.with_suffix(".svg"))


def bench_step(
    shape: options.GivenShapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    density: options.Densities = [0.1],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=1, help="Of timing, per shape and density.")] = 15.0,
    configs: Annotated[
        bool, typer.Option("--configs", help="Time every configuration of every kernel instead; for the first shape.")
    ] = False,
    split: Annotated[bool, typer.Option(help="The split weight gradient at 8192^3 as well.")] = True,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """Forward and backward of the FFN against dense PyTorch, the kernels of the step alone, and what is overhead."""
    from srelu24.bench import step as bench
    from srelu24.bench.results import BenchFile
    from srelu24.measuring.machine import environment

    shapes = [(each.m, each.d, each.f) for each in options.shapes_of(shape, model, tokens, default=[])]
    json = options.result_path(json, results, "step", dtype)
    if configs:
        rows = bench.bench_configs(shapes[0], dtype, density[0], seconds=seconds, on_event=views.note)
        if json is not None:
            BenchFile(env=environment("cuda"), rows=rows).save(json)
        return
    bench.bench_step(
        shapes,
        dtype,
        density,
        seconds_per_shape=seconds,
        split=split,
        json_path=json,
        on_event=views.note,
    )
