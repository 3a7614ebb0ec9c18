"""The command line: ``srelu24`` or ``python -m srelu24``.

Commands parse, call one function of the package and print. torch is imported only by those that compute.
Exit codes: 0 done, 1 an error (one line says which), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from srelu24 import cli_db, cli_training, views
from srelu24_gen import __version__, models
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Model, Shape
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget, target_by_key


class _Commands(TyperGroup):
    """An error raised on purpose is one red line, Ctrl-C one line; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Srelu24Error as error:
            if ctx.params.get("debug"):
                raise
            views.note(f"error: {error}", style="bold red")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            views.note("interrupted; what was finished is kept", style="yellow")
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks against the peers, on this GPU (docs/benchmarks.md).")
app.add_typer(cli_db.app, name="db")
app.add_typer(bench_app, name="bench")
bench_app.command("training")(cli_training.bench_training)
bench_app.command("step")(cli_training.bench_step)


def _shape(text: str | Shape) -> Shape:
    try:
        return Shape.parse(str(text))  # typer parses defaults too
    except Unsupported as error:
        raise typer.BadParameter(str(error)) from error


def _model(key: str | Model) -> Model:
    try:
        return models.model(str(key))
    except Unsupported as error:
        raise typer.BadParameter(str(error)) from error


def _shapes(
    given: list[Shape] | None, named: list[Model] | None, tokens: str | None, default: list[Shape]
) -> list[Shape]:
    """Each shape once: those given, then those of the named models; the default where neither names any."""
    if tokens is None:
        counts = list(models.TOKENS)
    elif not named:
        raise typer.BadParameter("--tokens are those of a model; add --model, or give whole shapes with --shape")
    elif re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", tokens):
        counts = [int(count) for count in tokens.split(",")]
    else:
        raise typer.BadParameter(f"--tokens {tokens!r} is not a list of numbers of tokens, such as 4096,16384")
    of_models = [shape for model in named or [] for shape in models.shapes(model, counts)]
    shapes = list(dict.fromkeys([*(given or []), *of_models])) or default
    if not shapes:
        raise typer.BadParameter("which shape? give --shape MxDxF or --model, such as --model nemotron-4-15b")
    return shapes


def _target(key: str | None) -> GpuTarget:
    """The target of that key; without one this machine's GPU, and where there is none the H200."""
    from srelu24 import doctor, run

    return target_by_key(key) if key else doctor.this_gpu() or target_by_key(run.DEFAULT_TARGET)


def _config(text: str) -> dict[str, Any]:
    """``tile_m=192,stages=4`` as fields of a KernelConfig."""
    fields: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise typer.BadParameter(f"{part!r} is not name=value, such as tile_m=192,stages=4")
        fields[name] = int(value) if value.lstrip("-").isdigit() else value
    return fields


DEFAULT_SHAPES = [Shape(16384, 4096, 16384)]
_SHAPE: dict[str, Any] = {"parser": _shape, "metavar": "MxDxF"}
_SHAPE_HELP = "Tokens x width x hidden width; may be repeated."
Shapes = Annotated[
    list[Shape] | None,
    typer.Option("--shape", help=_SHAPE_HELP, show_default=f"{DEFAULT_SHAPES[0]} without --model", **_SHAPE),
]
GivenShapes = Annotated[list[Shape] | None, typer.Option("--shape", help=_SHAPE_HELP, **_SHAPE)]
Models = Annotated[
    list[Model] | None,
    typer.Option(
        "--model", help="The FFN of a model (list --models); may be repeated.", parser=_model, metavar="MODEL"
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        help=f"Token counts of --model, such as 4096,16384; else {', '.join(map(str, models.TOKENS))}.",
        metavar="M,M",
    ),
]
Dtype = Annotated[DType, typer.Option("--dtype", help="Storage type; accumulation is fp32.")]
Gpu = Annotated[
    str | None, typer.Option("--gpu", help="Target, such as h200; this machine's GPU by default, else h200.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result file here.")]
Results = Annotated[
    Path | None, typer.Option("--results", metavar="DIR", help="Write to DIR/<gpu>/<name>_<dtype>.json.")
]
Densities = Annotated[list[float], typer.Option("--density", min=0, max=1, help="Share of non-zero activations.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"srelu24 {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Generate, tune and serve kernels for squared-ReLU FFNs with 2:4-pruned activations."""


def _models_table(known: list[Model]) -> Table:
    table = Table(title="models", title_justify="left")
    for column in ("model", "name", "D", "F", "note"):
        table.add_column(column, justify="right" if column in ("D", "F") else "left", overflow="fold")
    for each in known:
        table.add_row(each.key, each.name, str(each.d_model), str(each.d_ff), each.note)
    return table


@app.command("list")
def list_kernels(
    shape: Shapes = None,
    model: Models = None,
    tokens: Tokens = None,
    gpu: Gpu = None,
    dtype: Dtype = DType.BF16,
    named: Annotated[bool, typer.Option("--models", help="List the models that --model knows instead.")] = False,
    json: Json = False,
) -> None:
    """The kernels of a shape and their candidate configurations: chosen, built, recorded."""
    from srelu24 import catalogue

    if named:
        known = list(models.MODELS.values())
        if json:
            views.show_json(known)
        else:
            views.show(_models_table(known))
        return
    shapes = _shapes(shape, model, tokens, DEFAULT_SHAPES)
    target = _target(gpu)
    tables = {each: catalogue.kernels(each, dtype, target) for each in shapes}
    if json:
        views.show_json([row for rows in tables.values() for row in rows])
        return
    for each, rows in tables.items():
        views.show(views.kernels_table(rows, f"{each} {dtype} on {target.name}"))


@app.command()
def render(
    op: Annotated[Op, typer.Argument(help="The kernel.")],
    dtype: Dtype = DType.BF16,
    config: Annotated[str, typer.Option(help="Fields that differ from the default, as tile_m=192,stages=4.")] = "",
    shape: Annotated[
        Shape, typer.Option(help="What the default config suits.", show_default=False, **_SHAPE)
    ] = DEFAULT_SHAPES[0],
    gpu: Gpu = None,
    activation: Annotated[Activation | None, typer.Option(help="For gemm and sparsify24.")] = None,
    bias: Annotated[bool, typer.Option("--bias", help="Add a bias.")] = False,
    residual: Annotated[bool, typer.Option("--residual", help="Add a residual (spgemm).")] = False,
    count: Annotated[bool, typer.Option("--count", help="Count non-zeros per feature (gemm_relu2_24).")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to stdout.")] = None,
) -> None:
    """The CUDA source of a kernel, as it is compiled."""
    import srelu24_gen.render
    from srelu24_gen import space

    if activation is None:
        activation = Activation.RELU2 if op in (Op.GEMM_RELU2_24, Op.SPARSIFY24) else Activation.NONE
    m, d, f = shape
    problem = Problem(
        Family(op, dtype, activation, bias, residual, count),
        m,
        d if op is Op.SPGEMM else f,
        {Op.SPGEMM: f, Op.SPARSIFY24: 0}.get(op, d),
    )
    target = _target(gpu)
    chosen = KernelConfig.from_dict(space.default(problem, target).to_dict() | _config(config))
    verdict = space.supports(problem, chosen, target)
    if not verdict.ok:
        raise Unsupported(f"{problem} with this config: {verdict.reason}")
    source = srelu24_gen.render.render(KernelSpec(problem.family, chosen, target.arch)).source
    if output is None:
        print(source, end="")
        return
    try:
        output.write_text(source)
    except OSError as error:
        raise Srelu24Error(f"{output} cannot be written ({error.strerror}); choose another path") from error


@app.command()
def build(
    shape: Shapes = None,
    model: Models = None,
    tokens: Tokens = None,
    gpu: Gpu = None,
    dtype: Dtype = DType.BF16,
    every: Annotated[bool, typer.Option("--all", help="All candidates, not only the chosen ones.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Kernels compiled at a time.")] = os.cpu_count() or 1,
    json: Json = False,
) -> None:
    """Compile kernels for a GPU, on any machine; what is in the cache is not compiled again."""
    from srelu24 import catalogue

    shapes = _shapes(shape, model, tokens, DEFAULT_SHAPES)
    target = _target(gpu)
    specs = catalogue.specs_for(shapes, dtype, target, every_candidate=every)
    with views.progress() as bar:
        task = bar.add_task(f"building for {target.name}", total=len(specs))
        rows = catalogue.build_kernels(specs, jobs, on_done=lambda: bar.advance(task))
    if json:
        views.show_json(rows)
    else:
        views.show(views.built_table(rows))
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


@app.command()
def tune(
    shape: GivenShapes = None,
    model: Models = None,
    tokens: Tokens = None,
    dtype: Dtype = DType.BF16,
    density: Annotated[float, typer.Option(min=0, max=1, help="Share of non-zero activations.")] = 0.1,
    budget: Annotated[float, typer.Option(min=1, help="Seconds per shape.")] = 120.0,
    resume: Annotated[bool, typer.Option(help="Take over what an earlier run measured.")] = True,
    json: Json = False,
) -> None:
    """Search for the best configurations on this GPU; the winners go to your tuning database."""
    shapes = _shapes(shape, model, tokens, default=[])  # a search takes minutes: which shape is for the user to say
    from srelu24 import tune as tuner

    reports = []
    for each in shapes:
        with tuner.live_view() as on_event:
            report = tuner.tune_ffn(*each, dtype, density=density, budget_s=budget, resume=resume, on_event=on_event)
        reports.append(report)
    if json:
        views.show_json(reports)


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine has, what is wrong, and how to mend it; exits with 1 when something is wrong."""
    from srelu24 import doctor as doctor_module

    checks = doctor_module.diagnose()
    if json:
        views.show_json(checks)
    else:
        views.show(views.doctor_table(checks))
    if not doctor_module.healthy(checks):
        raise typer.Exit(1)


@app.command()
def run(
    shape: Shapes = None,
    model: Models = None,
    tokens: Tokens = None,
    dtype: Dtype = DType.BF16,
    budget: Annotated[float, typer.Option(min=0, help="Seconds of tuning per shape without a record.")] = 60.0,
    bench: Annotated[bool, typer.Option(help="Time the FFN against its peers, where there is a GPU.")] = True,
) -> None:
    """The main job: check the machine, build, tune, run and time an FFN."""
    from srelu24 import run as main_job

    if not main_job.run(_shapes(shape, model, tokens, DEFAULT_SHAPES), dtype, budget, bench):
        raise typer.Exit(1)


@bench_app.command("ffn")
def bench_ffn(
    shape: Shapes = None,
    model: Models = None,
    tokens: Tokens = None,
    dtype: Dtype = DType.BF16,
    density: Densities = [0.1, 0.5],  # noqa: B006
    json: JsonFile = None,
    results: Results = None,
) -> None:
    """The whole forward pass against torch.compile, our dense and unfused paths, and cuSPARSELt."""
    from srelu24 import run as main_job

    shapes = _shapes(shape, model, tokens, DEFAULT_SHAPES)
    main_job.benchmark("ffn", shapes, dtype, density, _result_path(json, results, "ffn", dtype))


@bench_app.command("gemm")
def bench_gemm(
    shape: Shapes = None,
    model: Models = None,
    tokens: Tokens = None,
    dtype: Dtype = DType.BF16,
    density: Densities = [0.1, 0.5],  # noqa: B006
    zeros: Annotated[bool, typer.Option("--zeros", help="On nothing but zeros as well.")] = False,
    json: JsonFile = None,
    results: Results = None,
) -> None:
    """Each kernel alone against cuBLAS and cuSPARSELt."""
    from srelu24 import run as main_job

    shapes = _shapes(shape, model, tokens, DEFAULT_SHAPES)
    main_job.benchmark("gemm", shapes, dtype, density, _result_path(json, results, "gemm", dtype), zeros=zeros)


@bench_app.command("report")
def bench_report(
    results: Annotated[Path, typer.Option("--results", metavar="DIR", exists=True, help="Where the result files are.")],
    readme: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The page to fill.")] = Path("README.md"),
) -> None:
    """Fill the README's tables and draw the plot from the result files."""
    from srelu24 import report

    report.update_readme(readme, results)
    report.plot(results, results / "ffn.svg")


def _result_path(json: Path | None, results: Path | None, name: str, dtype: DType) -> Path | None:
    if json is None and results is not None:
        return results / _target(None).key / f"{name}_{dtype.value}.json"
    return json
