"""What several commands have in common: options, and how they become shapes, targets and seconds."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from srelu24_gen import models
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Model, Pass, Shape
from srelu24_gen.spec import Activation, DType, pruning_op
from srelu24_gen.target import GpuTarget, target_by_key


class Passes(StrEnum):
    """A :class:`~srelu24_gen.models.Pass`, or all of them."""

    FORWARD = Pass.FORWARD.value
    BACKWARD = Pass.BACKWARD.value
    ALL = "all"

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(Pass) if self is Passes.ALL else (Pass(self.value),)


DEFAULT_TARGET = "h200"
"""What kernels are compiled for on a machine without a GPU that they run on."""
DEFAULT_SHAPES = [Shape(16384, 4096, 16384)]


def parse_shape(text: str | Shape) -> Shape:
    """``MxDxF``; wrong usage otherwise."""
    try:
        return Shape.parse(str(text))  # typer parses defaults too
    except Unsupported as error:
        raise typer.BadParameter(str(error)) from error


def parse_model(key: str | Model) -> Model:
    """A model by its key; wrong usage otherwise."""
    try:
        return models.model(str(key))
    except Unsupported as error:
        raise typer.BadParameter(str(error)) from error


_A_YEAR = 366 * 24 * 3600


def _seconds(text: str | float) -> float:
    """``90``, ``90s``, ``8m`` or ``1h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip().lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 1 <= seconds <= _A_YEAR:
        raise typer.BadParameter(f"{text!r} is not a time of at least a second, at most a year, such as 90s, 8m or 1h")
    return seconds


SHAPE: dict[str, Any] = {"parser": parse_shape, "metavar": "MxDxF"}
_SHAPE_HELP = "Tokens x width x hidden width; may be repeated."
Shapes = Annotated[
    list[Shape] | None,
    typer.Option("--shape", help=_SHAPE_HELP, show_default=f"{DEFAULT_SHAPES[0]} without --model", **SHAPE),
]
GivenShapes = Annotated[list[Shape] | None, typer.Option("--shape", help=_SHAPE_HELP, **SHAPE)]
Models = Annotated[
    list[Model] | None,
    typer.Option(
        "--model", help="The FFN of a model (list --models); may be repeated.", parser=parse_model, metavar="MODEL"
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
AllModels = Annotated[
    bool,
    typer.Option("--all-models", help=f"Every named model of widths up to {models.LARGEST[0]}x{models.LARGEST[1]}."),
]
DModel = Annotated[int | None, typer.Option("--d-model", min=1, help="Width of a model; with --d-ff and --tokens.")]
DFf = Annotated[int | None, typer.Option("--d-ff", min=1, help="Its hidden width.")]
FromModule = Annotated[
    str | None,
    typer.Option(
        "--from-module",
        metavar="PACKAGE:FACTORY",
        help="Widths of the squared-ReLU FFNs of the model that this makes, on the meta device.",
    ),
]


def _storage_dtype(dtype: DType) -> DType:
    if dtype.bytes == 1:
        raise typer.BadParameter(f"{dtype.value} has recipes and scales (docs/fp8.md); give bf16 or fp16")
    if dtype is DType.FP32:
        raise typer.BadParameter("fp32 is a type of weight gradients alone; give bf16 or fp16")
    return dtype


def _tuned_dtype(dtype: DType) -> DType:
    if dtype in (DType.E5M2, DType.FP32):
        what = "weights beside e4m3" if dtype is DType.E5M2 else "weight gradients alone"
        raise typer.BadParameter(f"{dtype.value} is a type of {what}; give bf16, fp16 or e4m3")
    return dtype


def _pruned_activation(activation: Activation) -> Activation:
    try:
        pruning_op(activation)
    except Unsupported as error:
        raise typer.BadParameter(str(error)) from error
    return activation


Dtype = Annotated[DType, typer.Option("--dtype", help="Storage type; accumulation is fp32.", callback=_storage_dtype)]
TunedDtype = Annotated[DType, typer.Option("--dtype", help="Type of the operands.", callback=_tuned_dtype)]
WhichPasses = Annotated[
    Passes, typer.Option("--pass", help="The kernels of inference, those of a training step, or all.")
]
Activations = Annotated[
    Activation,
    typer.Option("--activation", help="Between the layers.", callback=_pruned_activation),
]
Bias = Annotated[bool, typer.Option("--bias", help="Kernels with biases, too.")]
WhichPass = Annotated[Pass, typer.Option("--pass", help="The GEMMs of inference, or of a training step.")]
Gpu = Annotated[
    str | None, typer.Option("--gpu", help="Target, such as h200; this machine's GPU by default, else h200.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result file here.")]
Results = Annotated[
    Path | None, typer.Option("--results", metavar="DIR", help="Write to DIR/<gpu>/<name>_<dtype>.json.")
]
Densities = Annotated[list[float], typer.Option("--density", min=0, max=1, help="Share of non-zero activations.")]
Density = Annotated[float, typer.Option("--density", min=0, max=1, help="Share of non-zero activations.")]
SECONDS: dict[str, Any] = {"parser": _seconds, "metavar": "TIME"}


def shapes_of(
    given: list[Shape] | None,
    named: list[Model] | None,
    tokens: str | None,
    default: list[Shape],
    *,
    all_models: bool = False,
    d_model: int | None = None,
    d_ff: int | None = None,
    from_module: str | None = None,
) -> list[Shape]:
    """Each shape once: those given, then those of models and widths; the default where nothing names any."""
    widths = [(m.d_model, m.d_ff) for m in [*(named or []), *(models.all_models() if all_models else [])]]
    if (d_model is None) != (d_ff is None):
        raise typer.BadParameter("--d-model and --d-ff go together")
    if d_model is not None and d_ff is not None:
        widths.append((d_model, d_ff))
    if from_module is not None:
        from srelu24.nn.from_module import widths_of

        widths += widths_of(from_module)
    if tokens is None:
        counts = list(models.TOKENS)
    elif not widths:
        raise typer.BadParameter("--tokens are those of a model; add --model, or give whole shapes with --shape")
    else:
        counts = token_counts(tokens)
    of_widths = [Shape(m, d, f) for d, f in widths for m in counts]
    shapes = list(dict.fromkeys([*(given or []), *of_widths])) or default
    if not shapes:
        raise typer.BadParameter("which shape? give --shape MxDxF or --model, such as --model nemotron-4-15b")
    return shapes


def token_counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9][0-9]{0,17}(,[1-9][0-9]{0,17})*", text):
        raise typer.BadParameter(f"--tokens {text!r} is not a list of numbers of tokens, such as 4096,16384")
    return [int(count) for count in text.split(",")]


def target_of(key: str | None) -> GpuTarget:
    """The target of that key; without one this machine's GPU, and where there is none the H200."""
    from srelu24.cli import doctor

    return (
        target_by_key(key.lower().removeprefix("nvidia-"))
        if key
        else doctor.this_gpu() or target_by_key(DEFAULT_TARGET)
    )


def named_result(json: Path | None, results: Path | None, name: str) -> Path | None:
    """Where a benchmark of all types writes: the file, or ``<name>.json`` in the GPU's folder."""
    return results / target_of(None).key / f"{name}.json" if json is None and results is not None else json


def result_path(json: Path | None, results: Path | None, name: str, dtype: DType) -> Path | None:
    """Where a benchmark writes: the file, or ``<name>_<dtype>.json`` in the GPU's folder."""
    if json is None and results is not None:
        return results / target_of(None).key / f"{name}_{dtype.value}.json"
    return json
