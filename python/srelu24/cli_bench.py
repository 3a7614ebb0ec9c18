"""``srelu24 bench``: benchmarks, and the documents made from their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srelu24 import cli_options as options
from srelu24_gen.spec import DType

app = typer.Typer(no_args_is_help=True, help="Benchmarks against the peers, on this GPU (docs/benchmarks.md).")


@app.command("ffn")
def bench_ffn(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    density: options.Densities = [0.1, 0.5],  # noqa: B006
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """The whole forward pass against torch.compile, our dense and unfused paths, and cuSPARSELt."""
    from srelu24 import run as main_job

    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    main_job.benchmark("ffn", shapes, dtype, density, options.result_path(json, results, "ffn", dtype))


@app.command("gemm")
def bench_gemm(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    density: options.Densities = [0.1, 0.5],  # noqa: B006
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """Each kernel alone against cuBLAS and cuSPARSELt."""
    from srelu24 import run as main_job

    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    main_job.benchmark("gemm", shapes, dtype, density, options.result_path(json, results, "gemm", dtype))


@app.command("report")
def bench_report(
    results: Annotated[Path, typer.Option("--results", metavar="DIR", exists=True, help="Where the result files are.")],
    readme: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The page to fill.")] = Path("README.md"),
) -> None:
    """Fill the README's tables and draw the plot from the result files."""
    from srelu24 import report

    report.update_readme(readme, results)
    report.plot(results, results / "ffn.svg")
