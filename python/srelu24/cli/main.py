"""The command line: ``srelu24`` or ``python -m srelu24``.

Commands parse, call one function of the package and print. torch is imported only by those that compute.
Exit codes: 0 done, 1 an error (one line says which), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from srelu24 import whole_file
from srelu24.cli import bench, bench_training, cache, db, options, ship, streams, tune, views
from srelu24_gen import __version__, models
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import PRUNED_ACTIVATIONS, Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem
from srelu24_gen.target import GpuTarget


class _Commands(TyperGroup):
    """Whatever ends a command is one line: an error raised on purpose, one of the system, Ctrl-C, or a mistake of ours;
    a traceback only with --debug."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with streams.of_any_kind():
            return super().main(*args, **kwargs)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["debug"] = "--debug" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: views.note(f"warning: {message}", style="yellow")
                return super().invoke(ctx)
        except (typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            views.note("interrupted; what was finished is kept", style="yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.meta["debug"] or hasattr(error, "exit_code"):  # typer's own: wrong usage, and the end of a command
                raise
            views.note(f"error: {_sentence(error)}", style="bold red")
            raise typer.Exit(1) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, Srelu24Error):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, UnicodeError):
        return f"a file or an argument that was given is not UTF-8 text ({error})"
    return (
        f"srelu24 itself failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}; please report what"
        " `srelu24 --debug` shows of it"
    )


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.add_typer(cache.app, name="cache")
app.add_typer(db.app, name="db")
app.add_typer(bench.app, name="bench")
bench.app.command("training")(bench_training.bench_training)
bench.app.command("training-report")(bench_training.report_training)
bench.app.command("step")(bench_training.bench_step)
app.command()(tune.tune)
app.command()(ship.pack)
app.command()(ship.load)


def _config(text: str) -> dict[str, Any]:
    """``tile_m=192,stages=4`` as fields of a KernelConfig."""
    fields: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise typer.BadParameter(f"{part!r} is not name=value, such as tile_m=192,stages=4")
        words = {"true": True, "false": False}
        fields[name] = int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else words.get(value, value)
    return fields


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


@app.command("list")
def list_kernels(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    gpu: options.Gpu = None,
    dtype: options.Dtype = DType.BF16,
    named: Annotated[bool, typer.Option("--models", help="List the models that --model knows instead.")] = False,
    matrix: Annotated[bool, typer.Option("--matrix", help="List which GPUs have which kernels instead.")] = False,
    page: Annotated[Path | None, typer.Option(help="With --matrix: fill the table of this page.")] = None,
    json: options.Json = False,
) -> None:
    """The kernels of a shape and their candidate configurations: chosen, built, recorded."""
    from srelu24.documents import pages, registry, support
    from srelu24.shipping import catalogue

    if matrix:
        if page is not None:
            views.note(f"{page} was {'changed' if pages.fill(page, registry.of_gpus()) else 'up to date'}")
        elif json:
            views.show_json(support.matrix())
        else:
            views.show(views.support_table(support.matrix()))
        return

    if named:
        known = list(models.MODELS.values())
        if json:
            views.show_json(known)
        else:
            views.show(views.models_table(known))
        return
    shapes = options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES)
    target = options.target_of(gpu)
    tables = {each: catalogue.kernels(each, dtype, target) for each in shapes}
    if json:
        views.show_json([row for rows in tables.values() for row in rows])
        return
    for each, rows in tables.items():
        views.show(views.kernels_table(rows, f"{each} {dtype} on {target.name}, times as predicted"))


@app.command()
def render(
    op: Annotated[Op, typer.Argument(help="The kernel.")],
    dtype: options.Dtype = DType.BF16,
    config: Annotated[str, typer.Option(help="Fields that differ from the default, as tile_m=192,stages=4.")] = "",
    shape: Annotated[
        Shape, typer.Option(help="What the default config suits.", show_default=False, **options.SHAPE)
    ] = options.DEFAULT_SHAPES[0],
    gpu: options.Gpu = None,
    activation: Annotated[Activation | None, typer.Option(help="For gemm and sparsify24.")] = None,
    bias: Annotated[bool, typer.Option("--bias", help="Add a bias.")] = False,
    residual: Annotated[bool, typer.Option("--residual", help="Add a residual (spgemm).")] = False,
    count: Annotated[bool, typer.Option("--count", help="Count non-zeros per feature (gemm_relu2_24).")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to stdout.")] = None,
) -> None:
    """The CUDA source of a kernel, as it is compiled."""
    import srelu24_gen.render

    spec = _spec(op, dtype, activation, (bias, residual, count), config, shape, options.target_of(gpu))
    source = srelu24_gen.render.render(spec).source
    if output is None:
        print(source, end="")
        return
    try:
        whole_file.write(output, source.encode())
    except OSError as error:
        raise Srelu24Error(f"{output} cannot be written ({error.strerror}); choose another path") from error


def _spec(
    op: Op,
    dtype: DType,
    activation: Activation | None,
    flags: tuple[bool, bool, bool],
    config: str,
    shape: Shape,
    target: GpuTarget,
) -> KernelSpec:
    """One kernel: its op, options (bias, residual, count) and the fields in which it differs from the default."""
    from srelu24_gen import space

    if activation is None:
        usual = Activation.RELU2 if op is Op.SPARSIFY24 else Activation.NONE
        activation = PRUNED_ACTIVATIONS.get(op, usual)
    m, d, f = shape
    n, k = (d, f) if op is Op.SPGEMM else (f, d)
    problem = Problem(Family(op, dtype, activation, *flags), m, n, k if op.multiplies else 0)
    chosen = KernelConfig.from_dict(space.default(problem, target).to_dict() | _config(config))
    verdict = space.supports(problem, chosen, target)
    if not verdict.ok:
        raise Unsupported(f"{problem} with this config: {verdict.reason}")
    return KernelSpec(problem.family, chosen, target.arch)


@app.command()
def build(
    shape: options.Shapes = None,
    model: options.Models = None,
    all_models: options.AllModels = False,
    d_model: options.DModel = None,
    d_ff: options.DFf = None,
    from_module: options.FromModule = None,
    tokens: options.Tokens = None,
    gpu: options.Gpu = None,
    dtype: options.TunedDtype = DType.BF16,
    every: Annotated[bool, typer.Option("--all", help="All that tuning may time, not only what would run.")] = False,
    which: options.WhichPasses = options.Passes.FORWARD,
    bias: options.Bias = False,
    op: Annotated[Op | None, typer.Option("--op", help="Only this kernel, as --config and --activation say.")] = None,
    config: Annotated[
        str, typer.Option(help="With --op: fields that differ from the default, as tile_m=192,stages=4.")
    ] = "",
    activation: Annotated[
        Activation | None, typer.Option(help="Between the layers, relu2 by default; with --op, of that kernel.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Kernels compiled at a time.")] = os.cpu_count() or 1,
    json: options.Json = False,
) -> None:
    """Compile kernels for a GPU, on any machine; what is in the cache is not compiled again.

    Exits with 1 where a kernel does not compile, spills registers or has its MMAs serialised.
    """
    from srelu24.shipping import catalogue

    shapes = options.shapes_of(
        shape,
        model,
        tokens,
        options.DEFAULT_SHAPES,
        all_models=all_models,
        d_model=d_model,
        d_ff=d_ff,
        from_module=from_module,
    )
    target = options.target_of(gpu)
    if op is None and config:
        raise typer.BadParameter("--config is of one kernel; name it with --op")
    if op is not None:
        specs = [_spec(op, dtype, activation, (bias, False, False), config, shapes[0], target)]
    else:
        specs = catalogue.specs_for(
            shapes,
            dtype,
            target,
            every_candidate=every,
            passes=which.passes,
            bias=bias,
            activation=activation or Activation.RELU2,
        )
    with views.progress() as bar:
        task = bar.add_task(f"building for {target.name}", total=len(specs))
        rows = catalogue.build_kernels(specs, jobs, on_done=lambda: bar.advance(task))
    if json:
        views.show_json(rows)
    else:
        views.show(views.built_table(rows))
    for row in rows:
        if row.get("fault"):
            views.note(f"{row['name']} should not run: {row['fault']}", "bold red")
    if any(row["error"] or row.get("fault") for row in rows):
        raise typer.Exit(1)


@app.command("doctor")
def check_machine(json: options.Json = False) -> None:
    """What this machine has, what is wrong, and how to mend it; exits with 1 when something is wrong."""
    from srelu24.cli import doctor

    checks = doctor.diagnose()
    if json:
        views.show_json(checks)
    else:
        views.show(views.doctor_table(checks))
    if not doctor.healthy(checks):
        raise typer.Exit(1)


@app.command()
def run(
    shape: options.Shapes = None,
    model: options.Models = None,
    tokens: options.Tokens = None,
    dtype: options.Dtype = DType.BF16,
    budget: Annotated[float, typer.Option(min=0, help="Seconds of tuning per shape without a record.")] = 60.0,
    bench: Annotated[bool, typer.Option(help="Time the FFN against its peers, where there is a GPU.")] = True,
) -> None:
    """The main job: check the machine, build, tune, run and time an FFN."""
    from srelu24.cli import run as main_job

    if not main_job.run(options.shapes_of(shape, model, tokens, options.DEFAULT_SHAPES), dtype, budget, bench):
        raise typer.Exit(1)
