"""How sparse a model's squared-ReLU layers are on its own data, what 2:4 would drop, and whether it would pay."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from srelu24.db.choice import SPARSE, FfnChoice
from srelu24.figures import figure
from srelu24.nn import sites
from srelu24.nn.modules import Linear24, SquaredReLUFFN
from srelu24.nn.table import aligned
from srelu24.numerics.activations import squared_relu
from srelu24.numerics.dtypes import DTYPES
from srelu24.runtime import dispatch
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType
from srelu24_gen.target import GpuTarget, target_by_key

_CHUNK_ROWS = 4096


class LayerProfile(msgspec.Struct, kw_only=True):
    """One layer over all of the data. Shares are None where there is nothing to take a share of."""

    path: str
    d_model: int
    d_ff: int
    tokens: int
    """Rows seen."""
    density: float
    """Share of non-zero activations before pruning."""
    dropped: float | None
    """Share of the non-zeros that 2:4 drops."""
    energy_dropped: float | None
    """Share of the sum of squared activations that 2:4 drops."""
    expected_speedup: float | None
    """Dense over sparse time at this many tokens per batch, as the dispatcher knows it; None where it does not."""
    expected_from: str | None
    """Where that comes from: "measured", "between", "scaled" (tuning records) or "model" (no record: an estimate)."""
    recommended: str
    """sparse or dense."""
    why: str


class Profile(msgspec.Struct, kw_only=True):
    """What :func:`profile` found; ``print`` it for a table."""

    layers: list[LayerProfile]
    max_energy_dropped: float

    def json(self) -> str:
        """All of it, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def plot(self, path: Path | str) -> None:
        """Density and what 2:4 drops, by layer, into an image; the suffix says which kind.

        Raises:
            Srelu24Error: matplotlib is not installed, or the file cannot be written.
        """
        places = range(len(self.layers))
        with figure(path, max(6.0, 0.35 * len(self.layers)), 4.0) as drawn:
            axis = drawn.subplots()
            for label, values in (
                ("non-zero", [layer.density for layer in self.layers]),
                ("of the non-zeros dropped", [layer.dropped or 0.0 for layer in self.layers]),
                ("of the energy dropped", [layer.energy_dropped or 0.0 for layer in self.layers]),
            ):
                axis.plot(places, values, marker="o", label=label)
            axis.set_xticks(places, [layer.path for layer in self.layers], rotation=90, fontsize=7)
            axis.set_ylabel("share")
            axis.set_ylim(bottom=0)
            axis.legend()

    def __str__(self) -> str:
        head = ("layer", "DxF", "tokens", "density", "dropped", "energy dropped", "expected", "recommended", "why")
        rows = [
            (
                layer.path or "(the model)",
                f"{layer.d_model}x{layer.d_ff}",
                str(layer.tokens),
                _share(layer.density),
                _share(layer.dropped),
                _share(layer.energy_dropped),
                "-" if layer.expected_speedup is None else f"{layer.expected_speedup:.2f}x",
                layer.recommended,
                layer.why,
            )
            for layer in self.layers
        ]
        return aligned(head, rows)


class _Seen:
    """Sums over the activations of one layer, on the device where they are: nothing waits for it."""

    def __init__(self) -> None:
        self.tokens, self.batches = 0, 0
        self.width = 1
        self.sums: Tensor | None = None

    def add(self, a: Tensor) -> None:
        """Activations after squared ReLU, [..., F], F a multiple of 4."""
        rows = a.reshape(-1, a.shape[-1])
        self.tokens += rows.shape[0]
        self.batches += 1
        self.width = rows.shape[1]
        for part in rows.split(_CHUNK_ROWS):
            groups = part.double().unflatten(-1, (-1, 4)).sort(-1).values
            low = groups[..., :2]
            counted = ((groups != 0).sum(), (low != 0).sum(), groups.square().sum(), low.square().sum())
            sums = torch.stack([value.double() for value in counted])
            self.sums = sums if self.sums is None else self.sums + sums


def profile(
    model: nn.Module, data: Iterable[Any] | Tensor, *, max_energy_dropped: float = 0.01, gpu: str | None = None
) -> Profile:
    """Runs the model on data and looks at every squared-ReLU FFN in it, converted or not; the model is not changed.

    "sparse" is recommended where 2:4 drops at most ``max_energy_dropped`` of the energy of the layer's activations
    and the dispatcher would not run it dense anyway, by tuning records or else by its model. It is a rule of thumb:
    the model's own quality on its own task has the last word.

    Args:
        model: dense, or converted by :func:`srelu24.convert`.
        data: inputs of the model, one after the other: a tensor, a tuple of arguments or a dict of keyword arguments
            each; or one tensor or dict alone.
        max_energy_dropped: as a share.
        gpu: whose tuning records to ask, such as "h200"; the GPU that holds the model by default.

    Raises:
        Unsupported: the model has no squared-ReLU FFN, none of them ran, or there is no such GPU.
    """
    sites.check_module(model)
    target = target_by_key(gpu) if gpu else None
    layers = dict(_layers(model))
    if not layers:
        raise Unsupported(
            f"{type(model).__name__} has no squared-ReLU FFN; print(srelu24.convert(model)) says why each is left."
        )
    seen = {path: _Seen() for path in layers}
    hooks = [layer.hook(seen[path]) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in [data] if isinstance(data, Tensor | dict) else data:
                _call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = [layers[path].summary(path, seen[path], max_energy_dropped, target) for path in layers if seen[path].tokens]
    if not found:
        raise Unsupported("no squared-ReLU FFN ran; give data that the model takes, and at least one batch of it.")
    return Profile(layers=found, max_energy_dropped=max_energy_dropped)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


class _Layer:
    """A layer whose activations can be observed by a hook."""

    def __init__(self, watched: nn.Module, up: nn.Module | None, down: nn.Module) -> None:
        self._watched, self._up, self._down = watched, up, down

    def hook(self, seen: _Seen) -> Any:
        """Before the watched module: the input is X where it is the whole FFN, else already activations."""
        up = self._up

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (x,) = (*args, *kwargs.values())  # all of these take one input, by whatever name
            seen.add(x if up is None else squared_relu(up(x)))

        return self._watched.register_forward_pre_hook(look, with_kwargs=True)

    def summary(self, path: str, seen: _Seen, most: float, target: GpuTarget | None) -> LayerProfile:
        assert seen.sums is not None
        nonzero, low, energy, low_energy = seen.sums.tolist()
        f, d = int(self._down.in_features), int(self._down.out_features)  # type: ignore[arg-type]
        lost = low_energy / energy if energy else None
        choice = _choose(Shape(max(1, seen.tokens // seen.batches), d, f), next(self._down.parameters()), target)
        keep, why = _recommend(lost, choice, f, most)
        known = choice if choice and choice.source != "unknown" else None
        return LayerProfile(
            path=path,
            d_model=d,
            d_ff=f,
            tokens=seen.tokens,
            density=nonzero / (seen.tokens * seen.width),
            dropped=low / nonzero if nonzero else None,
            energy_dropped=lost,
            expected_speedup=known.gain if known else None,
            expected_from=known.source if known else None,
            recommended="sparse" if keep else "dense",
            why=why,
        )


def _layers(model: nn.Module) -> Iterable[tuple[str, _Layer]]:
    for path, module in model.named_modules():
        if isinstance(module, SquaredReLUFFN):
            yield path, _Layer(module, module.up, module.down)
        elif isinstance(module, Linear24):
            yield path, _Layer(module, None, module)
    for site in sites.find(model):
        if site.kind == "ffn":
            yield site.path, _Layer(site.module, site.up, site.down)
        elif site.kind == "core":
            yield f"{site.path}.{site.names[1]}".lstrip("."), _Layer(site.down, None, site.down)


def _recommend(lost: float | None, choice: FfnChoice | None, f: int, most: float) -> tuple[bool, str]:
    if f % 8:
        return False, f"F = {f} is not a multiple of 8"
    if lost is not None and lost > most:
        return False, f"2:4 would drop more than {most:.2%} of the energy"
    if choice is None:
        return True, "little is dropped; without a GPU nothing is known about its speed"
    if choice.source == "unknown":
        return True, f"little is dropped; {choice.why}"
    if choice.way != SPARSE:
        return False, f"dense is as fast; {choice.why}"
    return True, f"little is dropped; {choice.why}"


def _choose(shape: Shape, weight: Tensor, target: GpuTarget | None) -> FfnChoice | None:
    """What the dispatcher would choose for an FFN of these sizes; None where no kernel computes it."""
    try:
        target = target or dispatch.gpu_of(weight.device)
        return dispatch.choose_ffn(shape, DTYPES.get(weight.dtype, DType.BF16), False, False, target)
    except Unsupported:
        return None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
