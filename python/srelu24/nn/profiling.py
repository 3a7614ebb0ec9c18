"""How sparse a model's squared-ReLU layers are on its own data, what 2:4 would drop, and whether it would pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from srelu24.db.choice import SPARSE, FfnChoice
from srelu24.figures import figure
from srelu24.nn import sites
from srelu24.nn.data import Data, batches, feed
from srelu24.nn.layers import widths
from srelu24.nn.modules import Conv1D24, Linear24, SquaredReLUFFN
from srelu24.nn.raw import RawMatrices
from srelu24.nn.table import aligned
from srelu24.numerics.activations import squared_relu
from srelu24.numerics.dtypes import DTYPES
from srelu24.runtime import dispatch
from srelu24.runtime.operands import is_dtensor
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
    """Rows seen; 0 where the layer did not run or could not be looked at, and ``why`` says so."""
    density: float | None
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
                ("non-zero", [layer.density or 0.0 for layer in self.layers]),
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
        self.tokens, self.batches, self.elements = 0, 0, 0
        self.width = 0
        """Of the activations on this rank."""
        self.sums: Tensor | None = None
        self.spread: Any = None
        """Mesh and placements of activations that lie on several ranks."""
        self.error = ""

    def add(self, a: Tensor, weight: Tensor | None) -> None:
        """Activations after squared ReLU, [..., F], and the weight that they come from, whose shards tell those of
        plain activations."""
        a = a.values() if a.is_nested else a
        elements, rows = a.numel(), a.numel() // max(a.shape[-1], 1)
        if is_dtensor(a):
            self.spread = (a.device_mesh, a.placements)  # type: ignore[attr-defined]
            a = _local(a)
        elif weight is not None and is_dtensor(weight) and a.shape[-1] < weight.shape[0]:
            self.spread = (weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
            elements = rows * weight.shape[0]
        self.tokens += rows
        self.elements += elements
        self.batches += 1
        self.width = a.shape[-1]
        a = torch.nn.functional.pad(a.reshape(-1, self.width), (0, -self.width % 4))  # to whole groups, by zeros
        for part in a.split(_CHUNK_ROWS):
            groups = part.double().unflatten(-1, (-1, 4)).sort(-1).values
            low = groups[..., :2]
            counted = ((groups != 0).sum(), (low != 0).sum(), groups.square().sum(), low.square().sum())
            sums = torch.stack([value.double() for value in counted])
            self.sums = sums if self.sums is None else self.sums + sums

    def totals(self) -> list[float]:
        """Non-zeros, those that 2:4 drops, energy, and what it drops of that; over all ranks."""
        assert self.sums is not None
        if self.spread is None:
            return self.sums.tolist()
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, placements = self.spread
        parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        return DTensor.from_local(self.sums, mesh, parts, run_check=False).full_tensor().tolist()


def _local(a: Any) -> Tensor:
    """This rank's part of a DTensor; what is still to be summed is summed."""
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if placement.is_partial() else placement for placement in a.placements]
    return a.redistribute(placements=whole).to_local()  # type: ignore[no-any-return]


def profile(model: nn.Module, data: Data, *, max_energy_dropped: float = 0.01, gpu: str | None = None) -> Profile:
    """Runs the model on data and looks at every squared-ReLU FFN in it, converted or not; the model is not changed.

    "sparse" is recommended where 2:4 drops at most ``max_energy_dropped`` of the energy of the layer's activations
    and the dispatcher would not run it dense anyway, by tuning records or else by its model. It is a rule of thumb:
    the model's own quality on its own task has the last word.

    Args:
        model: dense, or converted by :func:`srelu24.convert`.
        data: inputs of the model, one after the other: a tensor, a tuple or list of arguments or a mapping of keyword
            arguments each; or one tensor or mapping alone.
        max_energy_dropped: as a share.
        gpu: whose tuning records to ask, such as "h200"; the GPU that holds the model by default.

    Returns:
        A row for each of them. Under tensor parallelism the shares are those of all ranks, which all have to call this.

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
            for batch in batches(data):
                feed(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(each.tokens or each.error for each in seen.values()):
        raise Unsupported("no squared-ReLU FFN ran; give data that the model takes, and at least one batch of it.")
    found = [layers[path].summary(path, seen[path], max_energy_dropped, target) for path in layers]
    return Profile(layers=found, max_energy_dropped=max_energy_dropped)


class _Layer:
    """Where the activations of one layer can be seen.

    Args:
        watched: before its call, its input is looked at.
        first: X, which the input is where the whole FFN is watched, to H; None where the input is the activations.
        of: module with the weights of the first layer.
        down: the second layer.
    """

    def __init__(
        self, watched: nn.Module, first: Callable[[Tensor], Tensor] | None, of: nn.Module | None, down: nn.Module
    ) -> None:
        self._watched, self._first, self._of = watched, first, of
        (self._f, self._d), self._weight = widths(down) or (0, 0), next(down.parameters())

    def hook(self, seen: _Seen) -> Any:
        """On the watched module. What goes wrong here is this layer's report, and the model runs on."""

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                (x,) = (*args, *kwargs.values())  # all of these take one input, by whatever name
                a = x if self._first is None else squared_relu(self._first(x))
                seen.add(a, None if self._of is None else self._of._parameters.get("weight"))
            except Exception as error:
                seen.error = seen.error or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

        return self._watched.register_forward_pre_hook(look, with_kwargs=True)

    def summary(self, path: str, seen: _Seen, most: float, target: GpuTarget | None) -> LayerProfile:
        """What was seen of the layer."""
        nonzero, low, energy, low_energy = seen.totals() if seen.sums is not None else (0.0, 0.0, 0.0, 0.0)
        lost = low_energy / energy if energy else None
        shape = Shape(max(1, seen.tokens // max(1, seen.batches)), self._d, seen.width or self._f)
        choice = _choose(shape, self._weight, target)
        keep, why = _recommend(lost, choice, self._f, most)
        if seen.error:
            keep, why = False, f"its activations could not be looked at ({seen.error})"
        elif not seen.tokens:
            keep, why = False, "it did not run on this data"
        elif not math.isfinite(energy):
            keep, why = False, "its activations are not finite"
        known = choice if choice and choice.source != "unknown" else None
        return LayerProfile(
            path=path,
            d_model=self._d,
            d_ff=self._f,
            tokens=seen.tokens,
            density=nonzero / seen.elements if seen.elements else None,
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
            up, down = module.two_layers
            raw = getattr(module, "raw", None)
            yield path, _Layer(module, _first_of(module, raw) if raw else up, up, down)
        elif isinstance(module, Linear24 | Conv1D24):
            yield path, _Layer(module, None, None, module)
    for site in sites.find(model):
        if site.kind == "ffn" and site.raw:
            yield site.path, _Layer(site.module, _first_of(site.module, site.raw), site.up, site.down)
        elif site.kind != "other":
            up, down = (site.module.get_submodule(name) for name in site.names)
            if site.kind == "ffn":
                yield site.path, _Layer(site.module, up, up, down)
            else:
                yield f"{site.path}.{site.names[1]}".lstrip("."), _Layer(down, None, None, down)


def _first_of(module: nn.Module, raw: RawMatrices) -> Callable[[Tensor], Tensor]:
    """The first product of a module that holds its matrices itself."""

    def first(x: Tensor) -> Tensor:
        w1, _, b1, _ = raw.operands(module, x.dtype)
        return torch.nn.functional.linear(x, w1, b1)

    return first


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
