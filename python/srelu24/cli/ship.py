"""``srelu24 pack`` and ``srelu24 load``: kernels and records for machines without a compiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from srelu24.cli import options, views
from srelu24_gen.spec import Activation, DType


def pack(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle, such as bundle.zip.")],
    shape: options.GivenShapes = None,
    model: options.Models = None,
    all_models: options.AllModels = False,
    d_model: options.DModel = None,
    d_ff: options.DFf = None,
    from_module: options.FromModule = None,
    tokens: options.Tokens = None,
    gpu: options.Gpu = None,
    dtype: options.TunedDtype = DType.BF16,
    which: options.WhichPasses = options.Passes.FORWARD,
    activation: options.Activations = Activation.RELU2,
    bias: options.Bias = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Kernels compiled at a time.")] = os.cpu_count() or 1,
    json: options.Json = False,
) -> None:
    """Pack the kernels that models run on a GPU, at any number of tokens up to the largest given, into one file, and
    their tuning records."""
    from srelu24.shipping import bundle

    shapes = options.shapes_of(
        shape,
        model,
        tokens,
        default=[],
        all_models=all_models,
        d_model=d_model,
        d_ff=d_ff,
        from_module=from_module,
    )
    target = options.target_of(gpu)
    with views.progress() as bar:
        task = bar.add_task(f"building for {target.name}", total=None)
        packed = bundle.pack(
            output,
            shapes,
            dtype,
            target,
            passes=which.passes,
            activation=activation,
            bias=bias,
            jobs=jobs,
            on_done=lambda total: bar.update(task, total=total, advance=1),
        )
    if json:
        views.show_json(packed)
    views.note(f"{packed.kernels} kernels and {packed.records} records for {target.name} packed into {output}")
    views.note(f"SHA-256 {packed.sha256}; `srelu24 load --sha256 ...` takes no other file")


def load(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle that `srelu24 pack` wrote.")],
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Take no other file than the one with this digest.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Check a bundle and install it: kernels into the cache, records into your tuning database.

    A bundle is code that your GPU runs: load only those of people that you would run a program of.
    """
    from srelu24.shipping import bundle

    loaded = bundle.load(path, sha256=sha256)
    if json:
        views.show_json(loaded)
    views.note(f"{loaded.kernels} kernels and {loaded.records} new records for {loaded.gpu} taken from {path}")
