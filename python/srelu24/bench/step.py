"""Benchmarks of the training step: forward and backward against dense PyTorch, its kernels alone, what is overhead.

Rows of a result file (:mod:`srelu24.bench.results`), by op: ``ffn_step`` is the whole, ``step_*`` are its parts, and
``split_gemm`` is a weight gradient of which a share of the features runs dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srelu24.bench.peers import plain_ffn
from srelu24.bench.results import BenchFile, Row, check_writable
from srelu24.bench.rows import candidate
from srelu24.measuring import machine
from srelu24.measuring.machine import require_gpu
from srelu24.measuring.timing import Call, interleave, ratio
from srelu24.measuring.workload import FFNData, make_ffn
from srelu24.numerics.sparse24 import Sparse24
from srelu24.runtime.dispatch import gpu_of
from srelu24.training import kernels, movers
from srelu24.training import ops as training_ops
from srelu24.training.packed import TokenSparse24
from srelu24.training.recipe import LayerState, Recipe
from srelu24.training.step import reason_against
from srelu24_gen import space
from srelu24_gen.compile import build_many
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelConfig, KernelSpec, Problem

SPLIT_SHAPE = Shape(8192, 8192, 8192)
SPLIT_SHARES = (0.0, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 1.0)
"""Sparse shares of the features, rounded to tiles of 64."""


@dataclass(eq=False, slots=True)
class StepCase:
    """A layer in the sparse phase of its recipe, with the packed operands of its step."""

    data: FFNData
    g: Tensor
    layer: LayerState
    s: Sparse24 = field(init=False)
    s_tokens: TokenSparse24 = field(init=False)
    dy1: Sparse24 = field(init=False)
    dy1_tokens: TokenSparse24 = field(init=False)
    w1_transposed: Tensor = field(init=False)
    w2_transposed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        x, w1, w2 = self.data.x, self.data.w1, self.data.w2
        self.w1_transposed, self.w2_transposed = w1.T.contiguous(), w2.T.contiguous()
        self.s, self.s_tokens, counts = kernels.pruned_hidden(x, w1, None, self.stride)
        self.dy1, self.dy1_tokens = kernels.hidden_gradient(self.g, self.w2_transposed, self.s, self.stride)
        self.layer.count(counts, len(x))
        self.layer.rank()

    @property
    def stride(self) -> int | None:
        """Stride of the groups along tokens."""
        return self.layer.recipe.token_stride

    @classmethod
    def make(cls, shape: Shape, dtype: DType, density: float, device: torch.device | str) -> StepCase:
        """Random data of that density, and the default recipe after its warm-up.

        Raises:
            Unsupported: the kernels do not take it; the message is the reason.
        """
        data = make_ffn(*shape, dtype, density, device)
        recipe = Recipe(warmup_steps=0)
        reason = reason_against(data.x, shape.f, recipe.token_stride, recipe.kernels)
        if reason is not None:
            raise Unsupported(f"the training kernels do not take {shape}: {reason}.")
        g = torch.randn_like(data.x).div_(shape.d**0.5)
        return cls(data, g, recipe.layer("ffn", data.w1))


def bench_step(
    shapes: Sequence[Shape],
    dtype: DType,
    densities: Sequence[float] = (0.1,),
    *,
    seconds_per_shape: float = 15.0,
    split: bool = True,
    json_path: Path | None = None,
    on_event: Callable[[str], None] = lambda text: None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """Measure every shape at every density, and the split at 8192^3; the file is saved after each.

    Raises:
        Unsupported: no shape or density, no supported GPU, or the kernels do not take a shape.
    """
    if not shapes or not densities:
        raise Unsupported("a benchmark needs at least one shape MxDxF and one density")
    require_gpu(device)
    check_writable(json_path)
    file = BenchFile(env=machine.environment(device), rows=[])

    def keep(rows: list[Row]) -> None:
        file.rows += rows
        if json_path is not None:
            file.save(json_path)
        for row in rows:
            on_event(_summary(row))

    for shape in shapes:
        for density in densities:
            keep(_step_rows(shape, dtype, density, device, seconds_per_shape))
    if split:
        keep(_split_rows(SPLIT_SHAPE, dtype, densities[0], device, seconds_per_shape))
    return file


def whole_steps(case: StepCase, compile_dense: Callable[..., Any] = torch.compile) -> dict[str, Call]:
    """Forward and backward, by candidate: gradients of x, w1 and w2."""
    leaves = [t.detach().requires_grad_() for t in (case.data.x, case.data.w1, case.data.w2)]
    compiled = compile_dense(plain_ffn)

    def call(forward: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(forward(*leaves), leaves, case.g)

    return {
        "srelu24": call(lambda x, w1, w2: training_ops.ffn(x, w1, w2, None, None, case.layer)),
        "torch_compile": call(compiled),
        "eager": call(plain_ffn),
    }


def parts(case: StepCase) -> dict[str, tuple[int, dict[str, Call]]]:
    """The parts of a step, by op: floating-point operations, and candidates, ours and cuBLAS on the same data."""
    x, w1, w2, g, stride = case.data.x, case.data.w1, case.data.w2, case.g, case.stride
    dense_s, dense_dy1, features = case.s.to_dense(), case.dy1.to_dense(), case.layer.dense_features
    flops = 2 * x.numel() * w1.shape[0]
    chosen = movers.dense_columns(case.s, features, stride)
    gradient, part = torch.zeros_like(w1), torch.ones_like(w1[features])
    products = {
        "step_hidden": (lambda: kernels.pruned_hidden(x, w1, None, stride), lambda: x @ w1.T),
        "step_y": (lambda: kernels.product(case.s, w2, None, stride), lambda: dense_s @ w2.T),
        "step_hidden_gradient": (
            lambda: kernels.hidden_gradient(g, case.w2_transposed, case.s, stride),
            lambda: g @ w2,
        ),
        "step_dx": (lambda: kernels.product(case.dy1, case.w1_transposed, None, stride), lambda: dense_dy1 @ w1),
        "step_dw1": (lambda: kernels.weight_gradient(case.dy1_tokens, x, stride), lambda: dense_dy1.T @ x),
        "step_dw2": (
            lambda: kernels.weight_gradient(case.s_tokens, g, stride, transposed=True),
            lambda: g.T @ dense_s,
        ),
    }
    overheads: dict[str, Call] = {
        "step_transpose": lambda: (movers.transposed(w1), movers.transposed(w2)),
        "step_split_columns": lambda: movers.dense_columns(case.s, features, stride),
        "step_split_clear": lambda: movers.clear_columns(case.s_tokens, features),
        "step_split_product": lambda: chosen.T @ x,
        "step_split_add": lambda: gradient.index_add_(0, features, part),
    }
    found: dict[str, tuple[int, dict[str, Call]]] = {
        op: (flops, {"srelu24": ours, "cublas": dense}) for op, (ours, dense) in products.items()
    }
    return found | {op: (0, {"srelu24": call}) for op, call in overheads.items()}


def bench_configs(
    shape: Shape,
    dtype: DType,
    density: float = 0.1,
    *,
    seconds: float = 60.0,
    on_event: Callable[[str], None] = lambda text: None,
    device: torch.device | str = "cuda",
) -> list[Row]:
    """Every candidate configuration of every kernel of the step, built and timed: rows ``config_*``, fastest first.

    Raises:
        As :func:`bench_step`; CompileError where a configuration cannot be built.
    """
    require_gpu(device)
    case = StepCase.make(shape, dtype, density, device)
    target = gpu_of(case.data.x.device)
    calls = {op: calls["srelu24"] for op, (flops, calls) in parts(case).items() if flops}
    rows = []
    for op, problem in _problems(shape, dtype).items():
        specs = [KernelSpec(problem.family, config, target.arch) for config in space.candidates(problem, target)]
        for built in build_many(specs):
            if isinstance(built, Srelu24Error):
                raise built
        named = {f"{s.name.split(f'_{s.arch}_')[1]}_g{s.config.raster_group}": s.config for s in specs}
        timings = interleave(
            {name: partial(_with_config, config, calls[op]) for name, config in named.items()},
            device=device,
            seconds=seconds / 5,
        )
        default = next(iter(timings.values()))
        ranked = dict(sorted(timings.items(), key=lambda item: item[1].ms))
        rows.append(
            Row(
                op=op.replace("step", "config"),
                dtype=dtype.value,
                shape=str(shape),
                density=density,
                candidates={name: candidate(timing, problem.flops) for name, timing in ranked.items()},
                speedup={name: ratio(timing, default) for name, timing in ranked.items()},
            )
        )
        best = next(iter(ranked))
        on_event(f"{op}: {best} {ranked[best].ms:.3f} ms, {rows[-1].speedup[best]:.3f}x the default")
    return rows


def _with_config(config: KernelConfig, call: Call) -> None:
    with kernels.fixed_config(config):
        call()


def _problems(shape: Shape, dtype: DType) -> dict[str, Problem]:
    """The kernels of a step, by the op of their part."""
    ops = ("step_hidden", "step_y", "step_hidden_gradient", "step_dw1", "step_dw2")
    return dict(zip(ops, shape.step_gemms(dtype), strict=True))


def saved_bytes(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Memory that the backward pass of one forward pass holds besides its inputs."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = forward()  # alive while counting, so that no address is given out twice
    del held
    return sum(found.values())


def _step_rows(shape: Shape, dtype: DType, density: float, device: torch.device | str, seconds: float) -> list[Row]:
    case = StepCase.make(shape, dtype, density, device)
    calls = whole_steps(case)
    whole = _row("ffn_step", shape, dtype, density, calls, 6 * 2 * shape.m * shape.d * shape.f, device, seconds / 2)
    leaves = [t.detach().requires_grad_() for t in (case.data.x, case.data.w1, case.data.w2)]
    inputs = [*leaves, case.layer.dense_features, case.layer.recipe.sparse_flag]
    whole.candidates["srelu24"].saved_bytes = saved_bytes(
        lambda: training_ops.ffn(leaves[0], leaves[1], leaves[2], None, None, case.layer), inputs
    )
    whole.candidates["eager"].saved_bytes = saved_bytes(lambda: plain_ffn(leaves[0], leaves[1], leaves[2]), inputs)
    pieces = parts(case)
    each = seconds / 2 / len(pieces)
    return [
        whole,
        *(_row(op, shape, dtype, density, calls, flops, device, each) for op, (flops, calls) in pieces.items()),
    ]


def _split_rows(shape: Shape, dtype: DType, density: float, device: torch.device | str, seconds: float) -> list[Row]:
    """A weight gradient [F, D] over M tokens: the sparse share on its kernel, the rest through cuBLAS."""
    m, d, f = shape
    rows = []
    for share in SPLIT_SHARES:
        sparse = round(f * share / 64) * 64
        case = StepCase.make(Shape(m, d, max(64, sparse)), dtype, density, device)
        dense = make_ffn(m, max(64, f - sparse), 64, dtype, density, device).x if sparse < f else None

        def call(case: StepCase = case, dense: Tensor | None = dense, sparse: int = sparse) -> None:
            if sparse:
                kernels.weight_gradient(case.s_tokens, case.data.x, case.stride)
            if dense is not None:
                torch.mm(dense.T, case.data.x)

        rows.append(
            _row(
                "split_gemm", shape, dtype, share, {"srelu24": call}, 2 * m * d * f, device, seconds / len(SPLIT_SHARES)
            )
        )
    return rows


def _row(
    op: str,
    shape: Shape,
    dtype: DType,
    density: float,
    calls: dict[str, Call],
    flops: int,
    device: torch.device | str,
    seconds: float,
) -> Row:
    timings = interleave(calls, device=device, seconds=seconds)
    ours = timings["srelu24"]
    return Row(
        op=op,
        dtype=dtype.value,
        shape=str(shape),
        density=density,
        candidates={name: candidate(timing, flops) for name, timing in timings.items()},
        speedup={name: ratio(ours, timing) for name, timing in timings.items() if name != "srelu24"},
    )


def _summary(row: Row) -> str:
    ours = row.candidates["srelu24"]
    text = f"{row.op} {row.shape} {row.dtype}, {row.density:g}: {ours.ms:.3f} ms"
    if ours.tflops is not None:
        text += f", {ours.tflops:.0f} TFLOP/s"
    return text + "".join(f", {ratio:.3f}x {peer}" for peer, ratio in row.speedup.items())
