"""Recipes: where the scale of the hidden S comes from. docs/fp8.md has their errors, and which to take.

X is scaled row by row from its own largest magnitude in all of them, weights by output channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from srelu24.fp8.quantize import inverse_scale, scale
from srelu24_gen.errors import Unsupported


class ScaleRecipe:
    """One way to scale S. Give its name or an instance to :func:`srelu24.ffn`.

    Attributes:
        name: what ``recipe=`` takes.
        safe: no row of hidden values within 2^-48..2^63 can overflow, saturate or be lost.
    """

    name: ClassVar[str]
    safe: ClassVar[bool]

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}

    def counter(self, device: torch.device) -> Tensor:
        """int64 []: the calls on ``device`` add the number of saturated values of S to it."""
        if device not in self._counters:
            with torch.inference_mode(False):  # so that calls in every mode may add to it
                made = torch.zeros((), dtype=torch.int64, device=device)
            if type(made) is not Tensor:  # a tracer's fake tensor, which must not be kept
                return made
            self._counters.setdefault(device, made)  # another thread may have been first
        return self._counters[device]

    def prepare(self, device: torch.device) -> None:
        """Make what calls on ``device`` need, so that compiled code finds it."""
        self.counter(device)

    @property
    def saturated(self) -> int:
        """Values of S that were too large for their scale, over all calls so far. Waits for the GPU."""
        return sum(int(counter) for counter in self._counters.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Rowwise(ScaleRecipe):
    """Every row of S is scaled by its own largest magnitude. Exact, but S crosses memory twice."""

    name = "rowwise"
    safe = True


class Predicted(ScaleRecipe):
    """Every row of S is scaled by a bound that is known before the first GEMM: Cauchy-Schwarz, from the norm of the row
    of X and the largest norm of a row of W1. Nothing can saturate. A row is lost where all its hidden values are less
    than 1/677 of their bound, which is below the noise that 8 bits leave in X."""

    name = "predicted"
    safe = False


class Static(ScaleRecipe):
    """One scale for all of S, found by :func:`calibrate`: an instance for each layer.

    Rows much larger than the calibration data saturate, rows much smaller are lost.

    Args:
        amax: the largest value of S to expect; None until :func:`calibrate` has set it.

    Raises:
        Unsupported: amax is not a positive finite number.
    """

    name = "static"
    safe = False

    def __init__(self, amax: float | None = None) -> None:
        super().__init__()
        self._amax = None if amax is None else _check_positive(amax)
        self._on_device: dict[torch.device, Tensor] = {}

    @property
    def amax(self) -> float | None:
        """The largest value of S that the scale is made for."""
        return self._amax

    def scales_on(self, device: torch.device) -> Tensor:
        """fp32 [2]: the scale of S and its inverse, on a device.

        Raises:
            Unsupported: not calibrated yet.
        """
        kept, value = self._on_device, self._amax  # in this order: a calibration in between replaces both
        if value is None:
            raise Unsupported("this Static recipe has no scale yet; run srelu24.calibrate on some data first")
        if device not in kept:
            with torch.inference_mode(False):
                amax = torch.tensor(value, dtype=torch.float32, device="cpu")
                made = torch.stack((scale(amax), inverse_scale(amax))).to(device)
            if type(made) is not Tensor:  # a tracer's fake tensor, which must not be kept
                return made
            kept[device] = made
        return kept[device]

    def prepare(self, device: torch.device) -> None:
        """Its counter, and its scale where that is known."""
        super().prepare(device)
        if self._amax is not None:
            self.scales_on(device)

    def calibrated(self, amax: float) -> None:
        """Set the scale for this largest value of S."""
        self._amax, self._on_device = _check_positive(amax), {}

    def __repr__(self) -> str:
        return f"Static(amax={self._amax})"


_NAMED: dict[str, ScaleRecipe] = {recipe.name: recipe for recipe in (Rowwise(), Predicted())}
_observed: dict[Static, Tensor] | None = None
"""The largest value of S of each recipe that the running calibration has met; None while none runs."""


def resolve(recipe: ScaleRecipe | str) -> ScaleRecipe:
    """The recipe of a name; instances pass.

    Raises:
        Unsupported: an unknown name, or "static", whose scale belongs to a layer.
    """
    if isinstance(recipe, ScaleRecipe):
        return recipe
    if recipe == Static.name:
        raise Unsupported("recipe 'static' needs a scale for each layer; give a srelu24.Static() and calibrate it")
    if recipe not in _NAMED:
        raise Unsupported(f"recipe is {recipe!r}; {', '.join(_NAMED)} or a srelu24.Static() is needed")
    return _NAMED[recipe]


def for_layer(recipe: ScaleRecipe | str) -> ScaleRecipe:
    """The recipe of one module: for a name a new recipe, whose counter is the module's own; instances pass.

    Raises:
        Unsupported: an unknown name, or no recipe.
    """
    if isinstance(recipe, ScaleRecipe):
        return recipe
    kinds: dict[object, type[ScaleRecipe]] = {kind.name: kind for kind in (Rowwise, Predicted, Static)}
    if not isinstance(recipe, str) or recipe not in kinds:
        raise Unsupported(f"recipe is {recipe!r}; a srelu24.Recipe or one of {', '.join(map(str, kinds))} is needed")
    return kinds[recipe]()


def calibrate(run: Callable[[Any], object], data: Iterable[Any]) -> list[Static]:
    """Find the scales of every :class:`Static` recipe that ``run`` uses.

    Meanwhile their layers run as ``rowwise``, so that they need no scale yet; gradients are off, and what
    torch.compile has compiled runs eagerly. One calibration at a time in a process.

    Args:
        run: a module or a function; called with each item of ``data``.
        data: batches like those to come.

    Returns:
        The recipes that were met, in order, now calibrated.

    Raises:
        Unsupported: no Static recipe was met, or a layer's S was zero throughout, or not finite.
    """
    global _observed
    seen: dict[Static, Tensor] = {}
    _observed = seen
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for item in data:
                run(item)
    finally:
        _observed = None
    if not seen:
        raise Unsupported("calibration met no layer with a Static recipe; pass one as recipe= to srelu24.ffn")
    largest = {recipe: float(amax) for recipe, amax in seen.items()}
    for position, amax in enumerate(largest.values()):
        if not math.isfinite(amax) or amax <= 0:
            raise Unsupported(f"layer {position} had a largest hidden value of {amax}; calibrate on other data")
    for recipe, amax in largest.items():
        recipe.calibrated(amax)
        recipe.prepare(seen[recipe].device)
    return list(largest)


def calibrating() -> bool:
    """Whether a :func:`calibrate` is running in this process."""
    return _observed is not None


def observe(recipe: Static, amax: Tensor) -> None:
    """Report the largest magnitude of each row of a layer's S, fp32 [M], to the running calibration."""
    seen = _observed
    if seen is None or amax.numel() == 0:
        return
    largest = amax.amax()
    seen[recipe] = torch.maximum(seen[recipe], largest) if recipe in seen else largest


def _check_positive(amax: float) -> float:
    if not math.isfinite(amax) or amax <= 0:
        raise Unsupported(f"the largest hidden value is {amax}; a positive finite number is needed")
    return amax
