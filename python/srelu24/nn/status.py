"""What every FFN of a model runs for given numbers of tokens, from which record, and why it is not sparse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from srelu24.fp8.recipes import Static
from srelu24.nn import sites, watching
from srelu24.nn.layers import Operands, any_global_hook, is_linear, is_plain, kind_of, widths
from srelu24.nn.modules import Conv1D24, Linear24, SquaredReLUFFN
from srelu24.nn.table import aligned
from srelu24.numerics.dtypes import DTYPES
from srelu24.ops.explanation import Explanation, explain, explain_kernels
from srelu24.runtime.dispatch import gpu_of
from srelu24.runtime.operands import is_dtensor, kernel_reason
from srelu24.training import step
from srelu24.training.recipe import LayerState
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape


class LayerStatus(msgspec.Struct, kw_only=True):
    """One layer at one number of tokens, without gradients."""

    path: str
    layer: str
    """"ffn", "linear24" (only the second layer prunes) or "none": not converted."""
    d_model: int
    d_ff: int
    tokens: int
    mode: str
    """auto, sparse or dense; or the recipe's name."""
    runs: str
    """"kernels" (sparse), "reference" (the same numbers in plain PyTorch, as on a CPU), "dense", "error" (a call
    raises) or "unknown" (an adapter around a layer, which the first call judges)."""
    record: str
    """Which tuning records the kernels come from; empty where none are asked."""
    why: str
    """Why that runs: where it is dense, what stands against sparse."""


class Status(msgspec.Struct, kw_only=True):
    """What :func:`status` found; ``print`` it for a table, iterate it for its rows."""

    layers: list[LayerStatus]

    def __iter__(self) -> Iterator[LayerStatus]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def json(self) -> str:
        """All of it, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def __str__(self) -> str:
        head = ("layer", "is", "DxF", "tokens", "mode", "runs", "record", "why")
        rows = [
            (
                row.path or "(the model)",
                row.layer,
                f"{row.d_model}x{row.d_ff}",
                str(row.tokens),
                row.mode,
                row.runs,
                row.record or "-",
                row.why,
            )
            for row in self.layers
        ]
        return aligned(head, rows)


def status(model: nn.Module, tokens: int | Iterable[int] = 2048) -> Status:
    """What every FFN of a model runs in inference, converted or not; nothing is run or changed.

    Args:
        model: as it is now: with its hooks, adapters and recipes, on its device.
        tokens: number or numbers of rows M: batch times sequence length, and batch alone for decoding.

    Returns:
        A row for each layer and number of tokens.

    Raises:
        Unsupported: the model is no module, or a number of tokens is not positive.
    """
    sites.check_module(model)
    counts = [tokens] if isinstance(tokens, int) else list(tokens) if isinstance(tokens, Iterable) else []
    if not counts or any(not isinstance(m, int) or isinstance(m, bool) or m < 1 for m in counts):
        raise Unsupported(f"tokens are {tokens!r}; at least one positive number of rows is needed.")
    found = {site.path: site for site in sites.find(model)}
    rows: list[LayerStatus] = []
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, SquaredReLUFFN):
                rows += [_of_ffn(path, module, m) for m in counts]
            elif isinstance(module, Linear24 | Conv1D24):
                rows += [_of_second(path, module, m) for m in counts]
            elif path in found:
                rows += [_of_site(found[path], m) for m in counts]
    return Status(layers=rows)


def _of_site(site: sites.Site, m: int) -> LayerStatus:
    why = site.why if site.kind == "other" else "not converted; srelu24.convert(model) does it"
    sizes = (widths(site.up), widths(site.down)) if site.names[0] else (None, None)
    d, f = sizes[0] or (0, 0)
    return LayerStatus(
        path=site.path, layer="none", d_model=d, d_ff=f, tokens=m, mode="-", runs="dense", record="", why=why
    )


def _of_ffn(path: str, ffn: SquaredReLUFFN, m: int) -> LayerStatus:
    d, f = widths(ffn.two_layers[0]) or (0, 0)
    explanation = _explanation_of(ffn, m, d, f)
    mode = ffn.mode
    if ffn.recipe is not None:
        mode = "training recipe" if isinstance(ffn.recipe, LayerState) else ffn.recipe.name
    return LayerStatus(
        path=path,
        layer="ffn",
        d_model=d,
        d_ff=f,
        tokens=m,
        mode=mode,
        runs=explanation.runs,
        record=_record(explanation),
        why=explanation.why,
    )


def _explanation_of(ffn: SquaredReLUFFN, m: int, d: int, f: int) -> Explanation:
    reason = ffn.what_changed() if ffn.read_before else ""
    reason = reason or watching.known_reason(ffn, recorded=False) or ""
    if reason:
        fails = ffn.mode == "sparse" or ffn.strict
        return Explanation("error" if fails else "dense", reason)
    for name, layer in zip(ffn.names, ffn.two_layers, strict=True) if ffn.mode != "dense" else ():
        if not is_linear(layer):
            why = f"its {name} is a {kind_of(layer)}, and a call shows whether that is more than a product"
            return Explanation("unknown", why)
    ups, downs = (_stand_in(layer) for layer in ffn.two_layers)
    f = downs.weight.shape[1]  # on this rank, under tensor parallelism
    ups = Operands(ups.weight[:f], None if ups.bias is None else ups.bias[:f])
    x = ups.weight.new_empty((m, d))
    explanation = _explained(ffn, x, ups, downs)
    watched = [name for name, layer in zip(ffn.names, ffn.two_layers, strict=True) if not is_plain(layer)]
    if (watched or any_global_hook()) and explanation.runs in ("kernels", "reference"):
        whose = f"of {' and '.join(watched)}" if watched else "on all modules"
        return Explanation(
            explanation.runs, f"{explanation.why}; layer by layer, for the hooks {whose}", explanation.kernels
        )
    return explanation


def _explained(ffn: SquaredReLUFFN, x: Tensor, ups: Operands, downs: Operands) -> Explanation:
    operands = (ups.weight, downs.weight, ups.bias, downs.bias)
    if isinstance(ffn.recipe, LayerState):
        recipe = ffn.recipe.recipe
        phase = "sparse" if recipe.sparse else f"dense warm-up of {recipe.warmup_steps} steps"
        biased = ups.bias is not None or downs.bias is not None
        against = step.reason_against(x, ups.weight.shape[0], recipe.token_stride, recipe.kernels, biased)
        why = f"trains as layer {ffn.recipe.name}: step {recipe.steps}, {phase}"
        runs = ("kernels" if against is None else "reference") if recipe.sparse else "dense"
        return Explanation(runs, why if against is None else f"{why}; {against}")
    if isinstance(ffn.recipe, Static) and ffn.recipe.amax is None:
        return Explanation("error", "its Static recipe has no scale yet; run srelu24.calibrate on some data")
    try:
        return explain(x, *operands, mode=ffn.mode, recipe=ffn.recipe)
    except Unsupported as error:
        return Explanation("error", str(error))


def _of_second(path: str, layer: Linear24 | Conv1D24, m: int) -> LayerStatus:
    f, d = widths(layer) or (0, 0)
    weight, bias = _stand_in(layer)
    a = weight.new_empty((m, f))
    if (reason := kernel_reason(a, weight, bias)) is not None:
        explanation = Explanation("dense", reason)
    elif not a.is_cuda:
        explanation = Explanation("reference", f"it is on {a.device}; the kernels need a CUDA device")
        if layer.mode == "dense":
            explanation = Explanation("dense", "dense was asked for")
    else:
        both = explain_kernels(Shape(m, d, f), DTYPES[a.dtype], False, bias is not None, gpu_of(a.device), layer.mode)
        explanation = Explanation(both.runs, both.why, both.kernels[1:] if both.runs == "kernels" else ())
    return LayerStatus(
        path=path,
        layer="linear24",
        d_model=d,
        d_ff=f,
        tokens=m,
        mode=layer.mode,
        runs=explanation.runs,
        record=_record(explanation),
        why=explanation.why,
    )


def _stand_in(layer: nn.Module) -> Operands:
    """Weight [N, K] and bias [N] of a layer to ask about: its own, or where those have to be computed or gathered,
    memory like them; what is spread over ranks by K as this rank has it, in the type that a casting layer most likely
    meets."""
    k, n = widths(layer) or (0, 0)
    own, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if own is not None and is_dtensor(own):
        own = own.to_local()  # type: ignore[attr-defined]
        k = own.shape[1]
    elif type(layer) is nn.Linear and own is not None:
        return Operands(own, bias)
    some = own if own is not None else next(layer.parameters())
    casts = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward
    dtype = torch.bfloat16 if casts and some.dtype is torch.float32 else some.dtype
    biased = bias is not None or is_parametrized(layer, "bias")
    return Operands(some.new_empty((n, k), dtype=dtype), some.new_empty(n, dtype=dtype) if biased else None)


def _record(explanation: Explanation) -> str:
    sources = (
        f"{k.choice.source}, {k.choice.record.evidence.when}" if k.choice.record else "none: the cost model"
        for k in explanation.kernels
    )
    return "; ".join(dict.fromkeys(sources))
