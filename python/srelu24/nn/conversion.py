"""Swaps the squared-ReLU FFNs of a model (:mod:`srelu24.nn.sites` finds them) for pruned ones, in place, and back.

With a recipe of training or of the 8-bit forward each of them is a layer of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from srelu24.fp8.recipes import ScaleRecipe, Static, for_layer
from srelu24.nn import recipe_state, sites, swap
from srelu24.nn.modules import Conv1D24, Linear24, SquaredReLUFFN
from srelu24.nn.sites import Site
from srelu24.runtime.operands import check_mode
from srelu24.training.recipe import Recipe
from srelu24_gen.errors import Unsupported


@dataclass(frozen=True)
class Converted:
    """A module that was changed.

    Attributes:
        path: qualified name; of the FFN, or of the second linear layer where only that was changed.
        layer: "ffn" or "linear24".
        d_model, d_ff: D and F.
        note: why only the second layer, or which recipe; else empty.
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
    nothing: str = ""
    """Where nothing was converted nor left, what the model has instead."""
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Gives every module its own code back. The objects are the same, so that training, hooks, attributes and
        wrappers since then are kept."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        if self.nothing:
            return self.nothing
        lines = [f"converted {len(self.converted)}, left {len(self.left)}"]
        for done in self.converted:
            what = "FFN" if done.layer == "ffn" else "second layer"
            note = f" ({done.note})" if done.note else ""
            lines.append(f"  {done.path or '(the model)'}: {what}, {done.d_model}x{done.d_ff}{note}")
        lines += [f"  left {each.path or '(the model)'}: {each.kind}, {each.why}" for each in self.left]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *,
    recipe: Recipe | ScaleRecipe | str | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    mode: str = "auto",
    strict: bool = False,
) -> Conversion:
    """Makes every squared-ReLU FFN of a model prune its hidden activations to 2:4, in place.

    A module that is an FFN as a whole becomes a :class:`SquaredReLUFFN`. Where its code does more (RWKV's channel mix
    has a gate and a shift), only the second layer becomes a :class:`Linear24`. It is the class of a module that
    changes: the object, its layers, parameters, attributes, hooks and state-dict keys stay. Where its own code reads a
    setting that changes later, such as the p of a dropout, that code runs again, dense, with a warning. Everything else
    is left and named.

    Args:
        model: on any device, "meta" included; what is wrapped by torch.compile, DDP or FSDP is converted before.
        recipe: train by a :class:`srelu24.Recipe`, in which every FFN becomes a layer of its qualified name, or compute
            in 8 bits: "rowwise", "predicted" or "static" (a scale for each FFN, from :func:`srelu24.calibrate`). A
            :class:`SquaredReLUFFN` that has none gets it too. What is not an FFN as a whole is then left.
        filter: called with the qualified name and the module of every FFN found; False leaves it.
        mode: of the converted layers, as for :func:`srelu24.ffn`: "auto" runs dense where pruning does not pay.
        strict: of all of these layers: a call that would fall back to dense PyTorch is an error that names the layer,
            as SRELU24_STRICT=1 makes it for the process. That "auto" is dense where that is faster is no fallback.

    Returns:
        What changed, what was left and why, and :meth:`Conversion.revert`.

    Raises:
        Unsupported: there is no such mode or recipe, both are given, or the model is no module.
    """
    check_mode(mode, "run")
    if recipe is not None:
        _check_recipe(recipe, mode)
    report = Conversion()
    chosen = filter or (lambda path, module: True)
    for site in sites.find(model):
        kind = type(site.module).__name__
        if site.kind == "other":
            report.left.append(Left(site.path, kind, site.why))
        elif not chosen(site.path, site.module):
            report.left.append(Left(site.path, kind, "left by the filter"))
        elif site.kind == "ffn" and site.path:
            _take(site, recipe, mode, strict, report)
        elif recipe is not None:
            report.left.append(Left(site.path, kind, f"a recipe runs whole FFNs; {site.why or _NOT_IN_PLACE}"))
        else:
            _prune_second(site, mode, strict, report)
    if recipe is not None:
        replaced = {done.path for done in report.converted}
        for path, module in model.named_modules():
            if isinstance(module, SquaredReLUFFN) and path not in replaced and chosen(path, module):
                _give_recipe(path, module, recipe, report)
    _name_ours(model, strict, report)
    if isinstance(recipe, Recipe) and report.converted:
        _keep_from_ddp(model, [done.path for done in report.converted], report)
    if not report.converted and not report.left:
        report.nothing = sites.why_nothing(model)
    return report


_NOT_IN_PLACE = "the model itself cannot be replaced in place"


def _check_recipe(recipe: Recipe | ScaleRecipe | str, mode: str) -> None:
    if mode != "auto":
        raise Unsupported(f"mode is {mode!r} and there is a recipe, which decides what runs; leave mode out.")
    if isinstance(recipe, Static):
        raise Unsupported("a Static recipe is for one layer; give recipe='static', which makes one for each FFN.")
    if not isinstance(recipe, Recipe):
        for_layer(recipe)


def _describe_recipe(recipe: Recipe | ScaleRecipe | str | None) -> str:
    """What the report says of the recipe."""
    if recipe is None:
        return ""
    return "trains by the recipe" if isinstance(recipe, Recipe) else f"8-bit, {for_layer(recipe).name}"


def _take(site: Site, recipe: Recipe | ScaleRecipe | str | None, mode: str, strict: bool, report: Conversion) -> None:
    """Makes the module a SquaredReLUFFN by its class."""
    kind, sizes = type(site.module), _sizes(site)
    try:
        ffn = swap.take(site, mode, strict)
    except Unsupported as error:
        report.left.append(Left(site.path, kind.__name__, str(error)))
        return
    swapped = type(ffn)
    try:
        ffn.set_recipe(recipe, site.path)
    except Unsupported as error:
        swap.give_back(ffn, swapped, kind)
        report.left.append(Left(site.path, kind.__name__, str(error)))
        return
    report._undo.append(lambda: swap.give_back(ffn, swapped, kind))
    report.converted.append(Converted(site.path, "ffn", *sizes, note=_describe_recipe(recipe)))


def _name_ours(model: nn.Module, strict: bool, report: Conversion) -> None:
    """Tells the layers that were there before what the model calls them, and makes them strict."""
    for path, module in model.named_modules():
        if isinstance(module, SquaredReLUFFN | Linear24 | Conv1D24):
            module.qualified_name = module.qualified_name or path
            if strict and not module.strict:
                module.strict = True
                report._undo.append(functools.partial(setattr, module, "strict", False))


def _keep_from_ddp(model: nn.Module, paths: list[str], report: Conversion) -> None:
    """Has DistributedDataParallel leave the recipe's buffers to each rank, by the attribute in which it looks."""
    before = getattr(model, _DDP_IGNORES, None)
    setattr(model, _DDP_IGNORES, [*(before or ()), *recipe_state.ignored_by_ddp(paths)])

    def undo() -> None:
        if before is None:
            delattr(model, _DDP_IGNORES)
        else:
            setattr(model, _DDP_IGNORES, before)

    report._undo.append(undo)


_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def _give_recipe(path: str, ffn: SquaredReLUFFN, recipe: Recipe | ScaleRecipe | str, report: Conversion) -> None:
    """Give the recipe to an FFN that is a SquaredReLUFFN already, and report it."""
    if ffn.recipe is not None:
        report.left.append(Left(path, type(ffn).__name__, "it has a recipe already"))
        return
    try:
        ffn.set_recipe(recipe, path)
    except Unsupported as error:
        report.left.append(Left(path, type(ffn).__name__, str(error)))
        return
    report._undo.append(lambda: ffn.set_recipe(None))
    sizes = int(ffn.up.in_features), int(ffn.up.out_features)  # type: ignore[arg-type]
    report.converted.append(Converted(path, "ffn", *sizes, note=_describe_recipe(recipe)))


def _prune_second(site: Site, mode: str, strict: bool, report: Conversion) -> None:
    """Makes the second layer a Linear24 by its class alone: parameters, hooks and ties stay what they are."""
    down = site.module.get_submodule(site.names[1])
    path = f"{site.path}.{site.names[1]}" if site.path else site.names[1]
    kind = type(down)
    try:
        swapped = type(swap.prune_second(down, mode, strict, path))
    except Unsupported as error:
        why = f"{site.names[1]} is a {kind.__name__} that cannot be changed: {error}; {site.why or _NOT_IN_PLACE}"
        report.left.append(Left(site.path, type(site.module).__name__, why))
        return
    report._undo.append(lambda: swap.restore_second(down, swapped, kind))
    note = site.why or _NOT_IN_PLACE
    report.converted.append(Converted(path, "linear24", *_sizes(site), note=note))


def _sizes(site: Site) -> tuple[int, int]:
    return int(site.up.in_features), int(site.up.out_features)  # type: ignore[arg-type]
