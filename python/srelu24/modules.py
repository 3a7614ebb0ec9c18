"""Squared-ReLU feed-forward networks as modules, under the names that models give their two linear layers."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from srelu24.operands import check_mode
from srelu24.ops import ffn
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
    Training is dense PyTorch, unless :meth:`train_with` gives it a recipe.

    Args:
        d_model: width D of input and output.
        d_ff: hidden width F. The kernels need D and F to be multiples of 8; others run dense.
        bias: both layers have one.
        names: of the children: first layer, second layer.
        mode: as for :func:`srelu24.ffn`: "auto", "sparse" or "dense"; may be set later.
        device: of the parameters, as for ``nn.Linear``; "meta" works.
        dtype: of the parameters.

    Raises:
        Unsupported: a width is not positive, or the two names are equal, empty or dotted, or
            there is no such mode.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        bias: bool = False,
        *,
        names: tuple[str, str] = NAMES[0],
        mode: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if min(d_model, d_ff) < 1:
            raise Unsupported(f"d_model is {d_model} and d_ff {d_ff}; both must be positive.")
        up = nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self._adopt(up, nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype), names, mode)

    @classmethod
    def of(cls, up: nn.Module, down: nn.Module, names: tuple[str, str] = NAMES[0], mode: str = "auto") -> Self:
        """The FFN of two existing layers, which it shares: nothing is copied.

        Raises:
            Unsupported: the second layer does not take the first one's output, or the names or the mode do not serve.
        """
        if getattr(up, "out_features", None) != getattr(down, "in_features", None):
            raise Unsupported(f"{up} and {down} do not follow each other; F out of one must be F into the other.")
        module = cls.__new__(cls)
        module._adopt(up, down, names, mode)
        return module

    def _adopt(self, up: nn.Module, down: nn.Module, names: tuple[str, str], mode: str) -> None:
        super().__init__()
        self.mode = check_mode(mode, "run")
        self.training_state: LayerState | None = None
        if len(names) != 2 or names[0] == names[1] or any(not name or "." in name for name in names):
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

    def train_with(self, recipe: Recipe, name: str) -> LayerState:
        """Train by a recipe from here on (docs/training.md), as its layer ``name``, on the device that it is on now.

        Raises:
            Unsupported: a layer is more than a plain ``nn.Linear``, F is not a multiple of 8, or the name is taken.
        """
        if not (is_plain(self.up) and is_plain(self.down)):
            raise Unsupported(f"{name} has a layer that is more than a plain nn.Linear; train it dense.")
        self.training_state = recipe.layer(name, self.up.weight)  # type: ignore[arg-type]
        return self.training_state

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        children = self._modules
        up, down = children[self.names[0]], children[self.names[1]]
        if is_plain(up) and is_plain(down):
            weights = (up.weight, down.weight, up.bias, down.bias)  # type: ignore[union-attr]
            if self.training_state is not None:
                return ffn(x, *weights, recipe=self.training_state)  # type: ignore[arg-type]
            return ffn(x, *weights, mode=self.mode)  # type: ignore[arg-type]
        return down(up(x).relu().square())  # type: ignore[misc, no-any-return]

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
        return "squared ReLU, hidden activations pruned to 2:4"


def are_free(names: tuple[str, str]) -> bool:
    """Whether a SquaredReLUFFN can have children of these names: it has attributes of its own."""
    own = ("mode", "names", "training", "training_state")
    return names == ("up", "down") or not any(name in own or hasattr(SquaredReLUFFN, name) for name in names)


def is_plain(layer: nn.Module | None) -> bool:
    """Whether calling ``layer`` is no more than a product with its weight; parametrized weights are weights."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return "forward" not in layer.__dict__ and _is_plain_weight(layer.weight)


def _is_plain_weight(weight: Tensor) -> bool:
    """A tensor, or one whose kind the operations know; a quantised one is its layer's own business."""
    if type(weight) is nn.Parameter:  # the usual case at once: this runs before every call
        return True
    subclass: bool = is_traceable_wrapper_subclass(weight)
    if not subclass:
        return True
    if type(weight).__name__ != "DTensor":
        return False
    if not torch.compiler.is_compiling():
        import srelu24.sharding  # noqa: F401 (the rules; whoever has such a weight has loaded what this imports)
    return True
