"""Prefill of a whole decoder stack, dense against converted, eager and compiled. Method: docs/benchmarks.md."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from msgspec import UNSET
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from srelu24.bench.results import BenchFile, Candidate, Row, check_writable
from srelu24.bench.rows import candidate
from srelu24.measuring import machine
from srelu24.measuring.machine import require_gpu
from srelu24.measuring.timing import Call, Interrupted, Timing, interleave, ratio
from srelu24.measuring.workload import make_ffn
from srelu24.nn.conversion import convert
from srelu24.nn.profiling import profile
from srelu24.numerics import reference
from srelu24.numerics.dtypes import TORCH_DTYPE
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType

TOKENS = (2048, 4096, 8192, 12288, 16384)
TOLERANCE = 3e-2
"""Relative distance allowed between the converted stack and the dense one with masked activations."""

MODES = ("eager", "compiled")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder stack without embedding and head."""

    name: str
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int


NEMOTRON = Architecture("nemotron-4-15b", 6144, 24576, layers=4, heads=48, kv_heads=8)
"""The widths of Nemotron-4 15B, four of its layers."""

TINY = Architecture("tiny", 64, 256, layers=2, heads=4, kv_heads=2)
"""To try the benchmark without a GPU."""


class _Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, through SDPA."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.width = a.d_model // a.heads
        self.q = nn.Linear(a.d_model, a.heads * self.width, bias=False)
        self.kv = nn.Linear(a.d_model, 2 * a.kv_heads * self.width, bias=False)
        self.out = nn.Linear(a.heads * self.width, a.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in (self.q(x), self.kv(x)))
        k, v = kv.chunk(2, dim=1)
        y = functional.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    speed = torch.exp(torch.arange(half, device=x.device) * (-9.21 / half))  # base 10000
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class _FFN(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.up_proj = nn.Linear(a.d_model, a.d_ff, bias=False)
        self.down_proj = nn.Linear(a.d_ff, a.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)).square())  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(a.d_model), _Attention(a)
        self.between, self.mlp = nn.LayerNorm(a.d_model), _FFN(a)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))  # type: ignore[no-any-return]


def make_stack(a: Architecture, dtype: DType, density: float, device: torch.device | str) -> nn.Sequential:
    """A random dense decoder stack whose FFNs have activations of this density; input and output [1, M, D].

    The norm before an FFN gives N(0, 1) + 1, as :func:`srelu24.measuring.workload.make_ffn` has it, and its weights are
    used.

    Raises:
        Unsupported: the density is not within 0..1, or D is too small for it.
    """
    torch.manual_seed(0)
    with torch.device(device):
        stack = nn.Sequential(*(_Layer(a) for _ in range(a.layers))).to(TORCH_DTYPE[dtype])
    for number, layer in enumerate(stack):
        assert isinstance(layer, _Layer)
        data = make_ffn(1, a.d_model, a.d_ff, dtype, density, device, seed=number)
        layer.mlp.up_proj.weight = nn.Parameter(data.w1)
        layer.mlp.down_proj.weight = nn.Parameter(data.w2)
        nn.init.ones_(layer.between.bias)
    return stack.eval().requires_grad_(False)


def bench_model(
    architecture: Architecture = NEMOTRON,
    tokens: Sequence[int] = TOKENS,
    dtype: DType = DType.BF16,
    density: float = 0.1,
    *,
    seconds: float = 20.0,
    json_path: Path | None = None,
    on_event: Callable[[str], None] | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """Times the stack, dense and converted, eager and compiled, at every token count; all four interleaved.

    Args:
        tokens: lengths of the one sequence, each a row of its own for every mode.
        density: of the FFNs' activations before pruning.
        seconds: of timing rounds per token count.
        json_path: result file, written after every token count.
        on_event: called with a line for each thing that begins.

    Raises:
        Unsupported: no such device, no token counts, or the converted stack's outputs are wrong.
        KeyboardInterrupt: Ctrl-C; what was measured is in the file.
    """
    device = torch.device(device)
    if device.type != "cpu":
        require_gpu(device)
    if not tokens or min(tokens) < 2:
        raise Unsupported(f"token counts are {list(tokens)}; at least one, of 2 or more, is needed.")
    check_writable(json_path)
    report = on_event or (lambda _: None)
    report(f"{architecture.name}, {architecture.layers} layers: weights")
    dense = make_stack(architecture, dtype, density, device)
    converted = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})  # the same weights, held once
    convert(converted)
    inputs = {m: _input(architecture, m, dtype, device) for m in tokens}
    with torch.inference_mode():
        measured = profile(dense, inputs[min(tokens)])
        _check(dense, converted, inputs[min(tokens)])
    env = machine.environment(device) | {"model": asdict(architecture)}
    file = BenchFile(env=env, rows=[])
    calls: dict[str, Callable[[Tensor], Tensor]] = {"srelu24 eager": converted, "dense eager": dense}
    graphs = {}
    for name, stack in (("srelu24 compiled", converted), ("dense compiled", dense)):
        report(f"torch.compile of {name.split()[0]}, on {len(tokens)} token counts")
        calls[name], graphs[name] = _compiled(stack, list(inputs.values()))
    found = sum(layer.density or 0.0 for layer in measured.layers) / len(measured.layers)
    for m, x in inputs.items():
        report(f"{m} tokens")
        with torch.inference_mode():
            peaks = {name: _peak_bytes(call, x) for name, call in calls.items()}
            run: dict[str, Call] = {name: partial(call, x) for name, call in calls.items()}
            try:
                timings, interrupted = interleave(run, device=device, seconds=seconds), False
            except Interrupted as stopped:
                timings, interrupted = stopped.timings, True
        for mode in MODES:
            candidates = {
                who: _candidate(timings.get(name := f"{who} {mode}"), m, peaks[name], graphs.get(name))
                for who in ("srelu24", "dense")
            }
            file.rows.append(_row(architecture, mode, m, dtype, density, found, candidates, timings))
        if json_path is not None:
            file.save(json_path)
        if interrupted:
            raise KeyboardInterrupt
    return file


def _input(a: Architecture, m: int, dtype: DType, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(m)
    return torch.randn(1, m, a.d_model, device=device, generator=random).to(TORCH_DTYPE[dtype])


def _check(dense: nn.Sequential, converted: nn.Sequential, x: Tensor) -> None:
    """Holds the converted stack to the dense one whose activations the reference prunes.

    Raises:
        Unsupported: they differ by more than rounding.
    """

    def prune(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        a = args[0]
        return (reference.sparsify24(a.flatten(0, -2), Activation.NONE).to_dense().view(a.shape),)

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(prune) for layer in dense]  # type: ignore[union-attr]
    wanted = dense(x)
    for hook in hooks:
        hook.remove()
    ours = [layer.mlp for layer in converted]
    for ffn in ours:
        ffn.mode = "sparse"  # type: ignore[assignment]
    found = converted(x)
    for ffn in ours:
        ffn.mode = "auto"  # type: ignore[assignment]
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not error <= TOLERANCE:
        raise Unsupported(f"the converted stack is wrong: relative distance {error:.2g}, allowed {TOLERANCE:g}.")


def _compiled(stack: nn.Module, inputs: Sequence[Tensor]) -> tuple[Callable[[Tensor], Tensor], int]:
    """The compiled stack, and how many graphs all the token counts took: 1 says that nothing was compiled again."""
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(stack, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for x in inputs:
            compiled(x)
    return compiled, counters["stats"]["unique_graphs"] - before


def _peak_bytes(call: Callable[[Tensor], Tensor], x: Tensor) -> int | None:
    """Of the GPU's memory, weights included; None on a CPU."""
    if not x.is_cuda:
        call(x)
        return None
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    call(x)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device)


def _candidate(timing: Timing | None, m: int, peak: int | None, graphs: int | None) -> Candidate:
    return candidate(
        timing,
        tokens_per_s=m / timing.ms * 1000 if timing else UNSET,
        peak_bytes=UNSET if peak is None else peak,
        graphs=UNSET if graphs is None else graphs,
    )


def _row(
    a: Architecture,
    mode: str,
    m: int,
    dtype: DType,
    density: float,
    measured: float,
    candidates: dict[str, Candidate],
    timings: dict[str, Timing],
) -> Row:
    ours, theirs = timings.get(f"srelu24 {mode}"), timings.get(f"dense {mode}")
    return Row(
        op=f"prefill_{mode}",
        dtype=dtype.value,
        shape=str(Shape(m, a.d_model, a.d_ff)),
        density=density,
        candidates=candidates,
        speedup={"dense": ratio(ours, theirs)} if ours and theirs else {},
        measured_density=measured,
    )
