"""``srelu24 tune``."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srelu24.cli import live, options, views
from srelu24.db.database import Database
from srelu24_gen.errors import Unsupported
from srelu24_gen.spec import Activation, DType

if TYPE_CHECKING:
    from srelu24.tuning.events import Event
    from srelu24.tuning.tuner import GpuRunner

BUDGET_S = 120.0


def tune(
    shape: options.GivenShapes = None,
    model: options.Models = None,
    all_models: options.AllModels = False,
    d_model: options.DModel = None,
    d_ff: options.DFf = None,
    from_module: options.FromModule = None,
    tokens: options.Tokens = None,
    dtype: options.TunedDtype = DType.BF16,
    which: options.WhichPasses = options.Passes.FORWARD,
    activation: options.Activations = Activation.RELU2,
    density: options.Density = 0.1,
    budget: Annotated[
        float | None,
        typer.Option(help="For each shape and pass, such as 30s or 2m.", show_default="120s", **options.SECONDS),
    ] = None,
    total: Annotated[
        float | None,
        typer.Option(help="For all together, in proportion to their kernels' times.", **options.SECONDS),
    ] = None,
    gpus: Annotated[str, typer.Option(help="GPUs to use: all, or numbers such as 0,1.", metavar="all|N,N")] = "0",
    resume: Annotated[
        bool, typer.Option(help="Leave out what is tuned, take over what an earlier run measured.")
    ] = True,
    dense: Annotated[bool, typer.Option("--dense", help="Tune our dense GEMMs too, with a third of the time.")] = False,
    ship: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Export your records there after every shape, as in tuning_db."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Search for the best configurations on your GPUs; the winners go to your tuning database."""
    shapes = options.shapes_of(
        shape,
        model,
        tokens,
        default=[],  # a search takes minutes: which shape is for the user to say
        all_models=all_models,
        d_model=d_model,
        d_ff=d_ff,
        from_module=from_module,
    )
    if budget is not None and total is not None:
        raise typer.BadParameter("give --budget for each shape or --total for all together, not both")
    from srelu24.tuning import many
    from srelu24.tuning.events import ShapeEnded

    seconds = many.Budget(total, per_shape=False) if total else many.Budget(budget or BUDGET_S)
    database = Database.open()
    with contextlib.ExitStack() as stack:
        runners = _runners(gpus)
        draw = stack.enter_context(live.live_view())

        def on_event(event: Event) -> None:
            draw(event)
            if ship is not None and isinstance(event, ShapeEnded) and event.report:
                database.export(ship)

        tuned = many.tune_shapes(
            shapes,
            dtype,
            runners,
            seconds,
            passes=which.passes,
            activation=activation,
            density=density,
            resume=resume,
            dense=dense,
            db=database,
            on_event=on_event,
        )
    if json:
        views.show_json(tuned)
    failed = [each for each in tuned if each.error]
    done = sum(each.report is not None for each in tuned)
    views.note(f"{done} tuned, {len(tuned) - done - len(failed)} tuned before, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _runners(gpus: str) -> list[GpuRunner]:
    """One per GPU that is asked for."""
    import torch

    from srelu24.tuning.tuner import GpuRunner

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == "all":
        numbers = list(range(max(count, 1)))
    elif re.fullmatch(r"\d+(,\d+)*", gpus):
        numbers = list(dict.fromkeys(map(int, gpus.split(","))))
    else:
        raise typer.BadParameter(f"--gpus {gpus!r} is neither all nor numbers such as 0,1")
    if count and (missing := [n for n in numbers if n >= count]):
        raise Unsupported(f"there is no GPU {missing[0]}; this machine has {count}, numbered from 0")
    return [GpuRunner(torch.device("cuda", number)) for number in numbers]
