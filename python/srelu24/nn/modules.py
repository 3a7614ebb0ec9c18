"""Squared-ReLU feed-forward networks as modules, under the names that models give their two linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from srelu24.fp8.recipes import ScaleRecipe, for_layer
from srelu24.nn import recipe_state, watching
from srelu24.nn.layers import Operands, any_global_hook, as_linear, is_linear, operands, widths
from srelu24.nn.layers import is_plain as is_plain
from srelu24.numerics.dtypes import DTYPES
from srelu24.ops.functions import ffn, linear24
from srelu24.runtime.fallback import STRICT, strictly, warn_dense
from srelu24.runtime.operands import autocasting, check_mode
from srelu24.training.recipe import LayerState, Recipe
from srelu24_gen.errors import Unsupported

NAMES: tuple[tuple[str, str], ...] = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("key", "value"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
"""First and second layer: Nemotron and Arcee; nanochat in transformers; GPT-2 and nanochat; RWKV; Persimmon."""


class SquaredReLUFFN(nn.Module):
    """``relu(x W1^T + b1)^2 W2^T + b2`` through :func:`srelu24.ffn`, its hidden activations pruned to 2:4.

    The two layers are children, ``nn.Linear`` under ``names``, so the state dict is that of the module it stands for,
    and :meth:`~torch.nn.Module.load_state_dict` (strict too) takes any of :data:`NAMES`. Layers with hooks, a replaced
    forward or an adapter around them are called. What only observes sees their inputs and outputs and changes nothing;
    with a layer that computes anything else the module is dense, with one warning that names it, and with mode "sparse"
    or :attr:`strict` an error. Training is dense PyTorch, unless a training recipe says otherwise.

    Args:
        d_model: width D of input and output.
        d_ff: hidden width F. The kernels need D and F to be multiples of 8; others run dense.
        bias: both layers have one.
        names: of the children: first layer, second layer.
        mode: as for :func:`srelu24.ffn`: "auto", "sparse" or "dense"; may be set later.
        recipe: as for :meth:`set_recipe`.
        device: of the parameters, as for ``nn.Linear``; "meta" works.
        dtype: of the parameters.

    Raises:
        Unsupported: a width is not positive, or the two names are equal, empty or dotted, or
            there is no such mode; or as :meth:`set_recipe`.
    """

    mode: str
    names: tuple[str, str]
    recipe: LayerState | ScaleRecipe | None = None
    """What :meth:`set_recipe` set: in training the layer's own state, in 8 bits the recipe."""
    input_name: str = "x"
    qualified_name: str = ""
    """Of the module in the model that :func:`srelu24.convert` was given; warnings and errors have it."""
    strict: bool = False
    """A call that would fall back to dense PyTorch raises instead; a choice of dense for its speed is no fallback."""
    read_before: tuple[tuple[nn.Module, str, object], ...] = ()
    """What the forward that a converted module had reads beside its layers: in which module, name and value then."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        bias: bool = False,
        *,
        names: tuple[str, str] = NAMES[0],
        mode: str = "auto",
        recipe: Recipe | ScaleRecipe | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not all(isinstance(width, int) and width > 0 for width in (d_model, d_ff)):
            raise Unsupported(f"d_model is {d_model!r} and d_ff {d_ff!r}; both must be positive whole numbers.")
        up = nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self._set_up(up, nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype), names, mode)
        if recipe is not None:
            self.set_recipe(recipe)

    @classmethod
    def of(
        cls,
        up: nn.Module,
        down: nn.Module,
        names: tuple[str, str] = NAMES[0],
        mode: str = "auto",
        input_name: str = "x",
    ) -> Self:
        """The FFN of two existing layers, which it shares: nothing is copied.

        Args:
            input_name: the keyword that callers may give the input by.

        Raises:
            Unsupported: the second layer does not take the first one's output, or the names or the mode do not serve.
        """
        if (widths(up) or (None, None))[1] != (widths(down) or (None, None))[0]:
            raise Unsupported(f"{up} and {down} do not follow each other; F out of one must be F into the other.")
        module = cls.__new__(cls)
        module._set_up(up, down, names, mode, input_name)
        return module

    def _set_up(self, up: nn.Module, down: nn.Module, names: tuple[str, str], mode: str, input_name: str = "x") -> None:
        super().__init__()
        two = isinstance(names, tuple | list) and len(names) == 2 and names[0] != names[1]
        if not two or any(not isinstance(name, str) or not name or "." in name for name in names):
            raise Unsupported(f"names are {names}; two different names without dots are needed.")
        if not are_free(names):
            raise Unsupported(f"names are {names}, and a SquaredReLUFFN has something else of that name; give others.")
        self._modules[names[0]] = up  # add_module refuses "up", which is a property here and gives this very child
        self._modules[names[1]] = down
        self.take_up(names, mode, input_name)

    def take_up(self, names: tuple[str, str], mode: str, input_name: str) -> None:
        """Set what a SquaredReLUFFN has beside its two layers."""
        self.mode = check_mode(mode, "run")
        self.input_name = input_name
        self.recipe = None
        self.names = (names[0], names[1])

    @property
    def two_layers(self) -> tuple[nn.Module, nn.Module]:
        """The two children."""
        children = self._modules
        return children[self.names[0]], children[self.names[1]]  # type: ignore[return-value]

    @property
    def up(self) -> nn.Module:
        """The first layer, D -> F; one that holds its weight in another form, as an ``nn.Linear`` to be asked."""
        return as_linear(self.two_layers[0])

    @property
    def down(self) -> nn.Module:
        """The second layer, F -> D, as :attr:`up`."""
        return as_linear(self.two_layers[1])

    def set_recipe(self, recipe: Recipe | ScaleRecipe | str | None, name: str = "") -> None:
        """Compute by a recipe from here on, or by none: then dense in training and by ``mode`` in inference.

        Args:
            recipe: of training (docs/training.md): the module becomes a layer of it, whose state is in buffers of the
                module: it goes where the weights go and is in state dicts; those without it load, too. A copy of the
                module has a recipe of its own, which counts its own steps, or takes steps over with the buffers. Or of
                the 8-bit forward (docs/fp8.md): "rowwise", "predicted", "static" (to be calibrated) or an instance; the
                weights stay as they are and are quantised beside, again whenever they have changed.
            name: of the layer in a training recipe and in its metrics; a number by default.

        Raises:
            Unsupported: a layer is more than a plain ``nn.Linear``, ``mode`` is not "auto", FSDP manages the weights of
                an 8-bit module, the widths do not serve, the name is taken, or there is no such recipe.
        """
        made = None if recipe is None else self._make_recipe(recipe, name)
        if isinstance(self.recipe, LayerState):
            self.recipe.leave()
            recipe_state.release(self)
        self.recipe = made
        if isinstance(made, LayerState):
            recipe_state.hold(self, made)

    def _make_recipe(self, recipe: Recipe | ScaleRecipe | str, name: str) -> LayerState | ScaleRecipe:
        up, down = self.two_layers
        if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and is_linear(up) and is_linear(down)):
            raise Unsupported(
                f"{name or 'the FFN'} has a layer that is more than a plain nn.Linear; no recipe runs it."
            )
        if self.mode != "auto":
            raise Unsupported(f"mode is {self.mode!r}; a recipe decides what runs, so leave it at auto.")
        if isinstance(recipe, Recipe):
            return recipe.layer(name or recipe.free_name(), up.weight)
        made = for_layer(recipe)
        if up.in_features % 16 or up.out_features % 16:
            raise Unsupported(f"D = {up.in_features}, F = {up.out_features}; 8 bits need multiples of 16.")
        self.check_not_sharded()
        made.prepare(up.weight.device)
        return made

    def check_not_sharded(self) -> None:
        """Raise Unsupported where FSDP manages the weights of an 8-bit module."""
        # It gathers weights into the same tensors under the same versions, so nothing tells that they have changed.
        if "_is_fsdp_managed_module" in self.__dict__:
            raise Unsupported("FSDP manages the weights of an FFN with an 8-bit recipe; shard the model without one.")

    def forward(self, x: Tensor | None = None, /, **named: Tensor) -> Tensor:
        """[..., D] -> [..., D]. The input may be given by ``input_name``."""
        if x is None or named:
            x = self.input_of(() if x is None else (x,), named)
        if self.read_before and (reason := self.what_changed()):
            return self.run_as_before(x, reason)
        children, (first, second) = self._modules, self.names
        ups, downs = operands(children[first], x), operands(children[second], x)
        if STRICT or self.strict:
            with strictly(self.label):
                if torch.compiler.is_compiling() and self.recipe is None:
                    self._refuse_what_no_kernel_takes(x)
                return self._run(x, ups, downs)
        return self._run(x, ups, downs)

    def _run(self, x: Tensor, ups: Operands | None, downs: Operands | None) -> Tensor:
        if ups is None or downs is None or any_global_hook():
            return watching.call(self, x)
        if self.recipe is not None:
            self.prepare_recipe(x)
        return ffn(x, ups[0], downs[0], ups[1], downs[1], mode=self.mode, recipe=self.recipe)

    def _refuse_what_no_kernel_takes(self, x: Tensor) -> None:
        # What a compiled graph runs later does not know that this module is strict.
        dtype = torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype
        if dtype not in DTYPES:
            warn_dense(f"the type is {dtype}, and the kernels take 16-bit floats")
        for width in widths(self.two_layers[0]) or ():
            if width % 8:
                warn_dense(f"a width of {width} is not a positive multiple of 8")

    def prepare_recipe(self, x: Tensor) -> None:
        """Before a call by a recipe."""
        if isinstance(self.recipe, ScaleRecipe):
            self.check_not_sharded()
        elif isinstance(self.recipe, LayerState) and not torch.compiler.is_compiling():
            recipe_state.follow(self, self.recipe, x)

    @property
    def label(self) -> str:
        """What warnings and errors call the module."""
        return self.qualified_name or type(self).__name__

    def what_changed(self) -> str:
        """What a converted module's own code reads that is no longer as it was, one phrase; empty where nothing is."""
        for module, name, before in self.read_before:
            now = module._modules[name] if name in module._modules else getattr(module, name, None)
            if now is before or (type(now) is type(before) and isinstance(now, _VALUES) and now == before):
                continue
            if not (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
                where = f"its {name}" if module is self else f"{name} of a {type(module).__name__} in it"
                return f"{where} has changed since the conversion, and its own code reads that"
        return ""

    def run_as_before(self, x: Tensor, reason: str) -> Tensor:
        """A converted module's own code, dense.

        Raises:
            Unsupported: as :meth:`fall_back`.
        """
        if torch.is_grad_enabled() and self.recipe is None and not self.strict:
            warn_dense(f"{self.label}: {reason}")
        else:
            self.fall_back(reason)
        original: type[nn.Module] = self.original  # type: ignore[assignment]
        return original.forward(self, x)  # type: ignore[no-any-return]

    def fall_back(self, reason: str) -> None:
        """Warn that the module runs dense; ``reason`` is one phrase about a layer.

        Raises:
            Unsupported: its mode is "sparse", or it is strict.
        """
        if self.mode == "sparse" or self.strict:
            how = "its mode is sparse" if self.mode == "sparse" else "strict is set"
            raise Unsupported(
                f"{self.label} cannot run pruned, and {how}: {reason}. Take that away, or set its mode to auto "
                "without strict, and it runs dense."
            )
        warn_dense(f"{self.label}: {reason}")

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The input among the arguments of a call.

        Raises:
            Unsupported: there is not exactly one.
        """
        given = (*args, *(value for name, value in kwargs.items() if name == self.input_name))
        if len(given) != 1 or len(args) + len(kwargs) != 1:
            raise Unsupported(
                f"the FFN was called with {len(args)} positional arguments and the keywords {sorted(kwargs)}; "
                f"it takes its input alone, which may be called {self.input_name!r}."
            )
        return given[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        first = next(self.up.parameters(), None)  # an adapter put there since may have none
        if isinstance(self.recipe, LayerState) and first is not None:
            if self.recipe.counts.is_meta or self.recipe.w1_grad is not None:
                self.recipe.to(first.device)
                recipe_state.hold(self, self.recipe)
            else:
                recipe_state.adopt(self, self.recipe)
        elif isinstance(self.recipe, ScaleRecipe) and first is not None:
            self.recipe.prepare(first.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.recipe, LayerState):
            if recipe_state.PREFIX + "steps" not in self._buffers:  # pickled before they were buffers
                recipe_state.hold(self, self.recipe)
            recipe_state.adopt(self, self.recipe, copies=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Runs before the children load: keys of other names become keys of this module's.
        ours = [f"{prefix}{name}." for name in self.names]
        if not any(key.startswith(tuple(ours)) for key in state_dict):
            for pair in NAMES:
                for mine, theirs in zip(ours, (f"{prefix}{name}." for name in pair), strict=True):
                    for key in [key for key in state_dict if key.startswith(theirs)]:
                        state_dict[mine + key[len(theirs) :]] = state_dict.pop(key)
        states = [f"{prefix}{recipe_state.PREFIX}{name}" for name in recipe_state.NAMES]
        if not isinstance(self.recipe, LayerState):
            for key in states:
                state_dict.pop(key, None)
        missing: list[str] = args[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing[before:] = [key for key in missing[before:] if key not in states]  # as in checkpoints of 0.1
        if isinstance(self.recipe, LayerState):
            recipe_state.adopt(self, self.recipe)
            self.recipe.follow()

    def extra_repr(self) -> str:
        """The kind of network, for ``print``."""
        kind = "squared ReLU, hidden activations pruned to 2:4"
        if self.recipe is None:
            return kind
        by = "trained as layer" if isinstance(self.recipe, LayerState) else "8-bit,"
        return f"{kind}, {by} {self.recipe.name}"


_VALUES = (bool, int, float, str, tuple)


def are_free(names: tuple[str, str]) -> bool:
    """Whether a SquaredReLUFFN can have children of these names: it has attributes of its own."""
    return names == ("up", "down") or not any(
        name == "training" or name in SquaredReLUFFN.__annotations__ or hasattr(SquaredReLUFFN, name) for name in names
    )


class Linear24(nn.Linear):
    """``nn.Linear`` through :func:`linear24`; parameters and state dict are those of ``nn.Linear``."""

    mode: str = "auto"
    """As for :func:`linear24`."""
    strict: bool = False
    """As :attr:`SquaredReLUFFN.strict`."""
    qualified_name: str = ""

    def forward(self, input: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        parameters = self._parameters
        if STRICT or self.strict or "weight" not in parameters or "bias" not in parameters:
            return self.multiply(input, self.weight, self.bias)
        # Not as attributes, which nn.Module looks up slowly: this runs before every call.
        return linear24(input, parameters["weight"], parameters["bias"], mode=self.mode)  # type: ignore[arg-type]

    def multiply(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """:func:`linear24` in this layer's mode."""
        if STRICT or self.strict:
            with strictly(self.qualified_name or type(self).__name__):
                return linear24(a, weight, bias, mode=self.mode)
        return linear24(a, weight, bias, mode=self.mode)


class Conv1D24(nn.Module):
    """A ``Conv1D`` of transformers through :func:`linear24`: its weight is held as [F, D]."""

    weight: Tensor
    bias: Tensor
    mode: str = "auto"
    strict: bool = False
    qualified_name: str = ""

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        return Linear24.multiply(self, x, self.weight.t().to(x.dtype).contiguous(), self.bias.to(x.dtype))  # type: ignore[arg-type]
