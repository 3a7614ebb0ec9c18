"""A module of somebody else becomes a :class:`SquaredReLUFFN`, or a linear layer a :class:`Linear24`, by its class.

The object stays: its parameters, attributes, hooks, extra state and overrides of ``nn.Module``, and whoever holds it.
The new class has the old one among its bases, so that only the forward is another. What the old forward read beside the
two layers is watched: once it has changed, the old forward runs again.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from srelu24.fp8.recipes import ScaleRecipe
from srelu24.nn.layers import is_conv1d, is_linear
from srelu24.nn.modules import Conv1D24, Linear24, SquaredReLUFFN
from srelu24.nn.raw import RawMatrices
from srelu24.nn.sites import Site
from srelu24.ops.functions import ffn
from srelu24.runtime.fallback import STRICT, strictly
from srelu24.training.recipe import Recipe
from srelu24_gen.errors import Unsupported


class _Swapped(nn.Module):
    """What every class made here has: the class before, and a way to be pickled, which finds classes by their names."""

    original: ClassVar[type[nn.Module]]
    ours: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
            return _remade, (self.ours, self.original), *reduced[2:]
        return reduced


def _remade(ours: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(swapped_class(ours, original))
    return made


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(ours: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The class of an ``original`` that runs as one of ``ours``: one for all of them."""
    if (kept := _made.get((ours, original))) is not None:
        return kept
    space = {"original": original, "ours": ours, "__module__": original.__module__, "__doc__": ours.__doc__}
    name = f"{ours.__name__.removeprefix('_')}Of{original.__name__}"
    made = types.new_class(name, (ours, original), {}, lambda namespace: namespace.update(space))
    return _made.setdefault((ours, original), made)


def put_back(module: nn.Module, swapped: type[nn.Module], original: type[nn.Module]) -> None:
    """Give a module the class it had. What was laid over the swapped one since, as FSDP and parametrizations do, is
    laid over that."""
    module.__class__ = _without(type(module), swapped, original)


def _without(kind: type, swapped: type, original: type) -> type:
    if kind is swapped:
        return original
    bases = tuple(_without(base, swapped, original) if issubclass(base, swapped) else base for base in kind.__bases__)
    space = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    name = kind.__name__.replace(swapped.__name__, original.__name__)
    return types.new_class(name, bases, {}, lambda namespace: namespace.update(space))


# ------------------------------------------------------------------------------------------------------- whole FFNs


class _SquaredReLUFFN(_Swapped, SquaredReLUFFN):
    """A squared-ReLU FFN of a model, with its hidden activations pruned to 2:4."""


class _RawSquaredReLUFFN(_Swapped, SquaredReLUFFN):
    """The same where the two matrices are parameters of the module itself."""

    raw: RawMatrices

    @property
    def two_layers(self) -> tuple[nn.Module, nn.Module]:
        return self.raw.layers(self)

    def forward(self, x: Tensor | None = None, /, **named: Tensor) -> Tensor:
        """[..., D] -> [..., D]. The input may be given by ``input_name``."""
        if x is None or named:
            x = self.input_of(() if x is None else (x,), named)
        if self.read_before and (reason := self.what_changed()):
            return self.run_as_before(x, reason)
        if STRICT or self.strict:
            with strictly(self.label):
                return self._run_raw(x)
        return self._run_raw(x)

    def _run_raw(self, x: Tensor) -> Tensor:
        cast = None if isinstance(self.recipe, ScaleRecipe) else x.dtype
        w1, w2, b1, b2 = self.raw.operands(self, cast)
        if self.recipe is not None:
            self.prepare_recipe(x)
        return ffn(x, w1, w2, b1, b2, mode=self.mode, recipe=self.recipe)

    def set_recipe(self, recipe: Recipe | ScaleRecipe | str | None, name: str = "") -> None:
        """As :meth:`SquaredReLUFFN.set_recipe`; 8 bits need matrices as ``nn.Linear`` holds them."""
        if recipe is not None and not isinstance(recipe, Recipe) and any(self.raw.transposed):
            raise Unsupported(f"{self.label} holds a matrix transposed, and would quantise a copy in every call.")
        super().set_recipe(recipe, name)


def take(site: Site, mode: str, strict: bool) -> SquaredReLUFFN:
    """Make the module of a site that is an FFN as a whole a :class:`SquaredReLUFFN`.

    Raises:
        Unsupported: its class cannot be changed.
    """
    module = site.module
    read = tuple(_read(module, site))
    input_name = site.input_name
    original = type(module)
    try:
        module.__class__ = swapped_class(_RawSquaredReLUFFN if site.raw else _SquaredReLUFFN, original)
    except TypeError as error:
        raise Unsupported(f"the class of a {original.__name__} cannot be changed ({error})") from error
    assert isinstance(module, SquaredReLUFFN)
    module.take_up(site.names, mode, input_name)
    module.read_before, module.strict, module.qualified_name = read, strict, site.path
    if isinstance(module, _RawSquaredReLUFFN):
        assert site.raw is not None
        module.raw = site.raw
    return module


def give_back(module: SquaredReLUFFN, swapped: type[nn.Module], original: type[nn.Module]) -> None:
    """Inverse of :func:`take`."""
    module.set_recipe(None)
    for name in (*SquaredReLUFFN.__annotations__, "raw"):
        module.__dict__.pop(name, None)
    put_back(module, swapped, original)


def _read(module: nn.Module, site: Site) -> Iterator[tuple[nn.Module, str, object]]:
    """Attributes and other children that the code of a module may read, and their values now."""
    ours = {*site.names, *((name for name in site.raw.biases if name) if site.raw else ())}
    names, base = _mentioned(type(module)), nn.Module().__dict__.keys()
    for name in sorted(names - ours - base):
        if name in module._modules or name in module.__dict__ or _is_setting(getattr(type(module), name, module)):
            yield module, name, _value(module, name)
        elif f"getattr {name}" in names:
            yield module, name, None
    for name, child in module._modules.items():
        for inner in child.modules() if child is not None and name not in ours else ():
            for setting, value in inner.__dict__.items():
                if setting not in base and _is_setting(value):
                    yield inner, setting, value


def _mentioned(kind: type[nn.Module]) -> set[str]:
    """Names in the code of a class but for how it is made; those given to ``getattr`` are there as such, too."""
    found: set[str] = set()
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(each).items():
            if name not in ("__init__", "extra_repr", "reset_parameters") and isinstance(function, types.FunctionType):
                codes = [function.__code__]
                while codes:
                    code = codes.pop()
                    found.update(code.co_names)
                    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
                    if not {"getattr", "hasattr"}.isdisjoint(code.co_names):
                        found.update(text for text in texts if text.isidentifier())
                        found.update(f"getattr {text}" for text in texts if text.isidentifier())
                    codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


def _is_setting(value: object) -> bool:
    return isinstance(value, bool | int | float | str | tuple | None)


def _value(module: nn.Module, name: str) -> object:
    return module._modules[name] if name in module._modules else getattr(module, name, None)


# ---------------------------------------------------------------------------------------------------- second layers


class _Linear24(_Swapped, Linear24):
    """A second layer of a subclass of ``nn.Linear``, with its input pruned to 2:4."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        weight, bias = self.weight, self.bias
        return self.multiply(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


class _Conv1D24(_Swapped, Conv1D24):
    """A second layer that holds its weight transposed, with its input pruned to 2:4."""


def prune_second(down: nn.Module, mode: str, strict: bool, path: str) -> Linear24 | Conv1D24:
    """Make the second layer of an FFN prune its input.

    Raises:
        Unsupported: it is no layer that can.
    """
    kind = type(down)
    if "forward" in down.__dict__:
        raise Unsupported("its forward was replaced on the instance")
    if not is_linear(down):
        raise Unsupported("its code may do more than a product with one plain weight")
    swapped = Linear24 if kind is nn.Linear else swapped_class(_Conv1D24 if is_conv1d(down) else _Linear24, kind)
    try:
        down.__class__ = swapped
    except TypeError as error:
        raise Unsupported(f"the class of a {kind.__name__} cannot be changed ({error})") from error
    assert isinstance(down, Linear24 | Conv1D24)
    down.mode, down.strict, down.qualified_name = mode, strict, path
    return down


def restore_second(down: nn.Module, swapped: type[nn.Module], original: type[nn.Module]) -> None:
    """Inverse of :func:`prune_second`."""
    for name in ("mode", "strict", "qualified_name"):
        down.__dict__.pop(name, None)
    put_back(down, swapped, original)
