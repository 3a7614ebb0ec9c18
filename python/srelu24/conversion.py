"""Swaps the squared-ReLU FFNs of a model (:mod:`srelu24.sites` finds them) for pruned ones, in place, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from srelu24 import sites
from srelu24.modules import SquaredReLUFFN
from srelu24.operands import check_mode
from srelu24.pruned_linear import Linear24
from srelu24.sites import Site


@dataclass(frozen=True)
class Converted:
    """A module that was changed.

    Attributes:
        path: qualified name; of the FFN, or of the second linear layer where only that was changed.
        layer: "ffn" or "linear24".
        d_model, d_ff: D and F.
        note: why only the second layer, else empty.
    """

    path: str
    layer: str
    d_model: int
    d_ff: int
    note: str


@dataclass(frozen=True)
class Left:
    """A module with the shape of an FFN that was left alone, and why."""

    path: str
    kind: str
    why: str


@dataclass
class Conversion:
    """What :func:`convert` did; ``print`` it, or :meth:`revert` it."""

    converted: list[Converted] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Puts the original modules back, with the layers as they are now: training since then is kept."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)}, left {len(self.left)}"]
        for done in self.converted:
            what = "FFN" if done.layer == "ffn" else "second layer"
            note = f" ({done.note})" if done.note else ""
            lines.append(f"  {done.path or '(the model)'}: {what}, {done.d_model}x{done.d_ff}{note}")
        lines += [f"  left {each.path or '(the model)'}: {each.kind}, {each.why}" for each in self.left]
        return "\n".join(lines)


def convert(
    model: nn.Module, *, filter: Callable[[str, nn.Module], bool] | None = None, mode: str = "auto"
) -> Conversion:
    """Makes every squared-ReLU FFN of a model prune its hidden activations to 2:4, in place.

    A module that is an FFN as a whole becomes a :class:`SquaredReLUFFN` with the same two layers as its children. Where
    its code does more (RWKV's channel mix has a gate and a shift), only the second layer becomes a :class:`Linear24`.
    Layers, parameters and state-dict keys stay the same objects and names. Everything else is left and named.

    Args:
        model: on any device, "meta" included; what is wrapped by torch.compile, DDP or FSDP is converted before.
        filter: called with the qualified name and the module of every FFN found; False leaves it.
        mode: of the converted layers, as for :func:`srelu24.ffn`: "auto" runs dense where pruning does not pay.

    Returns:
        What changed, what was left and why, and :meth:`Conversion.revert`.

    Raises:
        Unsupported: there is no such mode, or the model is no module.
    """
    check_mode(mode, "run")
    report = Conversion()
    for site in sites.find(model):
        if site.kind == "other":
            report.left.append(Left(site.path, type(site.module).__name__, site.why))
        elif filter is not None and not filter(site.path, site.module):
            report.left.append(Left(site.path, type(site.module).__name__, "left by the filter"))
        elif site.kind == "ffn" and site.path:
            _replace(model, site, mode, report)
        else:
            _prune_second(site, mode, report)
    return report


def _replace(model: nn.Module, site: Site, mode: str, report: Conversion) -> None:
    """Puts a SquaredReLUFFN wherever the model holds the module; some models share one between layers."""
    original = site.module
    ffn = SquaredReLUFFN.of(site.up, site.down, site.names, mode).train(original.training)
    slots = [
        (parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is original
    ]
    for parent, name in slots:
        parent._modules[name] = ffn

    def undo() -> None:
        for name, layer in zip(site.names, (ffn.up, ffn.down), strict=True):
            original._modules[name] = layer
        original.train(ffn.training)
        for parent, name in slots:
            parent._modules[name] = original

    report._undo.append(undo)
    report.converted.append(Converted(site.path, "ffn", *_sizes(site), note=""))


def _prune_second(site: Site, mode: str, report: Conversion) -> None:
    """Makes the second layer a Linear24 by its class alone: parameters, hooks and ties stay what they are."""
    down = site.down
    if type(down) is not nn.Linear:
        why = f"{site.names[1]} is a {type(down).__name__}, and only a plain nn.Linear can be changed; {site.why}"
        report.left.append(Left(site.path, type(site.module).__name__, why))
        return
    down.__class__ = Linear24
    down.mode = mode  # type: ignore[assignment]

    def undo() -> None:
        del down.mode
        down.__class__ = nn.Linear

    report._undo.append(undo)
    path = f"{site.path}.{site.names[1]}" if site.path else site.names[1]
    note = site.why or "the model itself cannot be replaced in place"
    report.converted.append(Converted(path, "linear24", *_sizes(site), note=note))


def _sizes(site: Site) -> tuple[int, int]:
    return int(site.up.in_features), int(site.up.out_features)  # type: ignore[arg-type]
