"""Squared-ReLU feed-forward networks as modules, under the names that models give their two linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from srelu24.fp8.recipes import ScaleRecipe, for_layer
from srelu24.numerics.activations import squared_relu
from srelu24.ops.functions import ffn, linear24
from srelu24.runtime.operands import check_mode, is_dtensor
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
    and :meth:`load_state_dict` (strict too) takes any of :data:`NAMES`. A layer that is more than a plain
    ``nn.Linear`` (an adapter around it, hooks, a quantised weight) is called as it is, and the module is then dense.
    Training is dense PyTorch, unless a training recipe says otherwise.

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

    recipe: LayerState | ScaleRecipe | None
    """What :meth:`set_recipe` set: in training the layer's own state, in 8 bits the recipe."""

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
        if getattr(up, "out_features", None) != getattr(down, "in_features", None):
            raise Unsupported(f"{up} and {down} do not follow each other; F out of one must be F into the other.")
        module = cls.__new__(cls)
        module._set_up(up, down, names, mode, input_name)
        return module

    def _set_up(self, up: nn.Module, down: nn.Module, names: tuple[str, str], mode: str, input_name: str = "x") -> None:
        super().__init__()
        self.mode = check_mode(mode, "run")
        self.input_name = input_name
        self.recipe = None
        two = isinstance(names, tuple | list) and len(names) == 2 and names[0] != names[1]
        if not two or any(not isinstance(name, str) or not name or "." in name for name in names):
            raise Unsupported(f"names are {names}; two different names without dots are needed.")
        if not are_free(names):
            raise Unsupported(f"names are {names}, and a SquaredReLUFFN has something else of that name; give others.")
        self.names = (names[0], names[1])
        self._modules[names[0]] = up  # add_module refuses "up", which is a property here and gives this very child
        self._modules[names[1]] = down

    @property
    def up(self) -> nn.Module:
        """The first layer, D -> F."""
        return self._modules[self.names[0]]  # type: ignore[return-value]

    @property
    def down(self) -> nn.Module:
        """The second layer, F -> D."""
        return self._modules[self.names[1]]  # type: ignore[return-value]

    def set_recipe(self, recipe: Recipe | ScaleRecipe | str | None, name: str = "") -> None:
        """Compute by a recipe from here on, or by none: then dense in training and by ``mode`` in inference.

        Args:
            recipe: of training (docs/training.md): the module becomes a layer of it, whose state moves with the
                weights. Or of the 8-bit forward (docs/fp8.md): "rowwise", "predicted", "static" (to be calibrated) or
                an instance. The weights stay as they are; an 8-bit copy of each is made, and again when it has changed.
            name: of the layer in a training recipe and in its metrics; a number by default.

        Raises:
            Unsupported: a layer is more than a plain ``nn.Linear``, ``mode`` is not "auto", FSDP manages the weights of
                an 8-bit module, the widths do not serve, the name is taken, or there is no such recipe.
        """
        made = None if recipe is None else self._make_recipe(recipe, name)
        if isinstance(self.recipe, LayerState):
            self.recipe.leave()
        self.recipe = made

    def _make_recipe(self, recipe: Recipe | ScaleRecipe | str, name: str) -> LayerState | ScaleRecipe:
        up, down = self.up, self.down
        if not isinstance(up, nn.Linear) or not (is_plain(up) and is_plain(down)):
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
        self._check_not_sharded()
        made.prepare(up.weight.device)
        return made

    def _check_not_sharded(self) -> None:
        # FSDP gathers weights into the same tensors under the same versions, so nothing tells that they have changed.
        if getattr(self, "_is_fsdp_managed_module", False):
            raise Unsupported("FSDP manages the weights of an FFN with an 8-bit recipe; shard the model without one.")

    def forward(self, x: Tensor | None = None, /, **named: Tensor) -> Tensor:
        """[..., D] -> [..., D]. The input may be given by ``input_name``."""
        if x is None or named:
            x = self.input_of(() if x is None else (x,), named)
        children = self._modules
        up, down = children[self.names[0]], children[self.names[1]]
        if is_plain(up) and is_plain(down):
            weights = (up.weight, down.weight, up.bias, down.bias)  # type: ignore[union-attr]
            if isinstance(self.recipe, ScaleRecipe):
                self._check_not_sharded()
            return ffn(x, *weights, mode=self.mode, recipe=self.recipe)  # type: ignore[arg-type]
        return down(squared_relu(up(x)))  # type: ignore[misc, no-any-return]

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
            self.recipe.to(first.device)
        elif isinstance(self.recipe, ScaleRecipe) and first is not None:
            self.recipe.prepare(first.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Runs before the children load: keys of other names become keys of this module's.
        ours = [f"{prefix}{name}." for name in self.names]
        if not any(key.startswith(tuple(ours)) for key in state_dict):
            for pair in NAMES:
                for mine, theirs in zip(ours, (f"{prefix}{name}." for name in pair), strict=True):
                    for key in [key for key in state_dict if key.startswith(theirs)]:
                        state_dict[mine + key[len(theirs) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The kind of network, for ``print``."""
        kind = "squared ReLU, hidden activations pruned to 2:4"
        if self.recipe is None:
            return kind
        by = "trained as layer" if isinstance(self.recipe, LayerState) else "8-bit,"
        return f"{kind}, {by} {self.recipe.name}"


def are_free(names: tuple[str, str]) -> bool:
    """Whether a SquaredReLUFFN can have children of these names: it has attributes of its own."""
    own = ("mode", "names", "input_name", "recipe", "training")
    return names == ("up", "down") or not any(name in own or hasattr(SquaredReLUFFN, name) for name in names)


def is_plain(layer: nn.Module | None) -> bool:
    """Whether calling ``layer`` does no more than multiply by its weight and add its bias. A parametrized weight counts
    as a weight."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return "forward" not in layer.__dict__ and _is_plain_weight(layer.weight)


def _is_plain_weight(weight: Tensor) -> bool:
    """Whether the operations can take the weight as it is. A quantised one has to be used by its own layer."""
    if type(weight) is nn.Parameter:  # the usual case at once: this runs before every call
        return True
    subclass: bool = is_traceable_wrapper_subclass(weight)
    if not subclass:
        return True
    if not is_dtensor(weight):
        return False
    if not torch.compiler.is_compiling():
        import srelu24.ops.sharding  # noqa: F401 (the rules; whoever has such a weight has loaded what this imports)
    return True


class Linear24(nn.Linear):
    """``nn.Linear`` through :func:`linear24`; parameters and state dict are those of ``nn.Linear``."""

    mode: str = "auto"
    """As for :func:`linear24`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        return linear24(input, self.weight, self.bias, mode=self.mode)
