"""``srelu24 bench``: benchmarks, and the documents made from their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srelu24.cli import live, options
from srelu24_gen.models import Pass
from srelu24_gen.spec import DType

app = typer.Typer(no_args_is_help=True, help="Benchmarks against the peers, on this GPU (docs/benchmarks.md).")

Seconds = Annotated[float, typer.Option(min=0.1, help="Of timing, per shape and density.")]
SWEEP_TOKENS = "16,32,64,128,256,512,1024,2048,4096,8192,16384,32768"
HELD_OUT_TOKENS = "384,768,1536,3072,6144,12288"


@app.command("ffn")
def bench_ffn(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    density: options.Densities = [0.1, 0.5],  # noqa: B006
    seconds: Seconds = 20.0,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """The whole forward pass against torch.compile, our dense and unfused paths, and cuSPARSELt."""
    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    live.benchmark("ffn", shapes, dtype, density, options.result_path(json, results, "ffn", dtype), seconds)


@app.command("gemm")
def bench_gemm(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    density: options.Densities = [0.1, 0.5],  # noqa: B006
    zeros: Annotated[bool, typer.Option("--zeros", help="On nothing but zeros as well.")] = False,
    seconds: Seconds = 10.0,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """Each kernel alone against cuBLAS and cuSPARSELt."""
    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    path = options.result_path(json, results, "gemm", dtype)
    live.benchmark("gemm", shapes, dtype, density, path, seconds, zeros=zeros)


@app.command("sweep")
def bench_sweep(
    shape: options.GivenShapes = None,
    model: options.Models = None,
    tokens: options.Tokens = SWEEP_TOKENS,
    dtype: options.Dtype = DType.BF16,
    density: options.Density = 0.1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing, per number of tokens.")] = 2.0,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """Over numbers of tokens: torch.compile's dense FFN, every way of ours, and what ffn() chooses."""
    shapes = options.shapes_of(shape, model, tokens if model else None, default=[])
    live.benchmark("sweep", shapes, dtype, [density], options.named_result(json, results, "sweep"), seconds)


@app.command("tuning")
def bench_tuning(
    shape: options.GivenShapes = None,
    model: options.Models = None,
    all_models: options.AllModels = False,
    tokens: options.Tokens = None,
    held_out: Annotated[
        str, typer.Option(metavar="M,M", help="Token counts without records, to measure what the nearest one loses.")
    ] = HELD_OUT_TOKENS,
    held_out_model: Annotated[str, typer.Option(metavar="MODEL", help="The model of --held-out.")] = "nemotron-4-15b",
    dtype: options.Dtype = DType.BF16,
    which: options.WhichPass = Pass.FORWARD,
    density: options.Density = 0.1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing, per shape.")] = 3.0,
    tune_seconds: Annotated[float, typer.Option(min=1, help="Of tuning, per held-out number of tokens.")] = 30.0,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """Tuned kernels against the defaults, and winners of other token counts against their own.

    Without a shape or a model only the latter.
    """
    tuned = shape or model or all_models or tokens or not held_out
    shapes = options.shapes_of(shape, model, tokens, default=[], all_models=all_models) if tuned else []
    held = options.shapes_of(None, [options.parse_model(held_out_model)], held_out, default=[]) if held_out else []
    path = options.named_result(json, results, "tuning" if which is Pass.FORWARD else "tuning_step")
    live.benchmark_tuning(shapes, held, dtype, density, seconds, tune_seconds, path, which)


@app.command("search")
def bench_search(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    which: options.WhichPass = Pass.FORWARD,
    density: options.Density = 0.1,
    cold: Annotated[float, typer.Option(min=1, help="Seconds of searching without a built kernel.")] = 60.0,
    warm: Annotated[float, typer.Option(min=1, help="Seconds of searching with what that has built.")] = 20.0,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """How long tuning takes on the clock, from nothing and from a warm cache; your records and kernels stay out."""
    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    path = options.named_result(json, results, "search" if which is Pass.FORWARD else "search_step")
    live.benchmark_search(shapes, dtype, density, (cold, warm), path, which)


@app.command("model")
def bench_model(
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of the prefill, such as 2048,16384.", metavar="M,M")
    ] = None,
    dtype: options.Dtype = DType.BF16,
    density: options.Density = 0.1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing per token count.")] = 20.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny stack on the CPU, to try it.")] = False,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """Prefill of a decoder stack as wide as Nemotron-4 15B: dense against converted, eager and compiled."""
    from srelu24.bench import model as model_bench
    from srelu24.cli import views

    counts = (64, 96, 128, 192, 256) if tiny else model_bench.TOKENS
    path = json if json or not results else results / "cpu" / "model.json"
    file = model_bench.bench_model(
        model_bench.TINY if tiny else model_bench.NEMOTRON,
        counts if tokens is None else options.token_counts(tokens),
        dtype,
        density,
        seconds=seconds,
        json_path=path if tiny else options.named_result(json, results, "model"),
        on_event=views.note,
        device="cpu" if tiny else "cuda",
    )
    views.show(views.bench_table(file.rows))


@app.command("report")
def bench_report(
    results: Annotated[Path, typer.Option("--results", metavar="DIR", exists=True, help="Where the result files are.")],
    page: Annotated[list[Path], typer.Option(exists=True, dir_okay=False, help="A page to fill; may be repeated.")] = [  # noqa: B006
        Path("README.md"),
        Path("docs/benchmarks.md"),
    ],
) -> None:
    """Fill the tables of the pages and draw the plots from the result files."""
    from srelu24.bench.results import load_results, of_recipes
    from srelu24.documents import pages, plots

    for each in page:
        pages.update_page(each, results)
    plots.plot_ffn(results, results / "ffn.svg")
    found = load_results(results)
    if any(row.row.op == "sweep" for row in found):
        plots.plot_sweep(results, results / "sweep.svg")
    if of_recipes(found):
        plots.plot_recipes(results, results / "fp8.svg")


@app.command("fp8")
def bench_fp8(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    density: options.Densities = [0.1, 0.5],  # noqa: B006
    seconds: Seconds = 20.0,
    json: options.JsonFile = None,
    results: options.Results = None,
) -> None:
    """The 8-bit recipes (docs/fp8.md) against torch's compiled, row-wise scaled FFN, and their kernels alone."""
    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    live.benchmark("fp8", shapes, DType.BF16, density, options.named_result(json, results, "fp8"), seconds)


@app.command("accuracy")
def bench_accuracy(
    json: Annotated[Path, typer.Option(dir_okay=False, help="The result file to write.")],
    document: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A page to fill.")] = None,
) -> None:
    """Errors of the 8-bit recipes against float64, on the CPU."""
    from srelu24.bench import accuracy
    from srelu24.bench.results import check_writable
    from srelu24.documents import accuracy as tables
    from srelu24.documents import pages

    check_writable(json)
    file = accuracy.measure(typer.echo)
    file.save(json)
    if document is not None:
        pages.refill(document, tables.tables(file))
