"""An FFN whose two layers are called, since hooks, a replaced forward or an adapter have a say in them.

The layers run as they are, and what reaches ``torch.nn.functional.linear`` inside is watched. A layer that hands its
input to one product and returns that product has observers at most: its hooks see input and output, and the FFN gives
the pruned numbers of the fused operation. A layer that computes anything else makes the FFN dense, with a warning that
names it; with ``mode="sparse"`` and in strict mode that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from srelu24.db.choice import SPARSE
from srelu24.nn.layers import is_linear, is_plain_weight, kind_of
from srelu24.numerics.sparse24 import Sparse24
from srelu24.ops.functions import NO_BACKWARD, ffn, gemm_relu2_24, matmul
from srelu24.runtime.dispatch import ffn_way
from srelu24.runtime.fallback import warn_dense
from srelu24.runtime.operands import autocast, has_tangent, is_dtensor, kernel_reason
from srelu24.training.recipe import LayerState
from srelu24.training.reference import kept_along_features
from srelu24_gen.errors import ToolchainError

if TYPE_CHECKING:
    from srelu24.nn.modules import SquaredReLUFFN

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Watch(TorchFunctionMode):
    """Computes the products of a layer by ``product``, input, weight and bias -> output, and keeps what went in and
    came out."""

    def __init__(self, product: Product, seen: list[tuple[Tensor, Tensor, int | None]]) -> None:
        super().__init__()
        self.product = product
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not linear:
            return func(*args, **(kwargs or {}))
        y = _apply_linear(self.product, *args, **(kwargs or {}))
        self.seen.append((args[0] if args else kwargs["input"], y, _version(y)))
        return y


def _apply_linear(product: Product, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return product(input, weight, bias)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to, so that a hook that writes to it is noticed; None where nothing counts."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


_interfering: WeakKeyDictionary[SquaredReLUFFN, tuple[object, str]] = WeakKeyDictionary()
"""FFNs with a layer that was seen to compute something else: in which state of the two layers, and why."""


def call(owner: SquaredReLUFFN, x: Tensor) -> Tensor:
    """The FFN of ``x`` [..., D] by calls of its two layers.

    Raises:
        Unsupported: it would have to run dense, and its mode is "sparse" or it is strict.
    """
    up, down = owner.two_layers
    if owner.mode == "dense":
        return _dense(up, down, x)
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in owner.parameters()))
    if owner.recipe is None and (recorded or has_tangent(x)):
        warn_dense(NO_BACKWARD)
        return _dense(up, down, x)
    if owner.recipe is not None:
        owner.prepare_recipe(x)
    if (reason := known_reason(owner, recorded)) is not None:
        owner.fall_back(reason)
        return _dense(up, down, x)
    step = _Step(owner, x)
    seen: list[tuple[Tensor, Tensor, int | None]] = []
    with _Watch(step.first, seen):
        h = up(x)
    if not _only_observed(seen, x, h):
        _interferes(owner, 0)
    elif step.pruned:
        s = step.shown(h)
        before, seen = _version(s), []
        with _Watch(step.second(s, before), seen):
            y: Tensor = down(s)
        if _only_observed(seen, s, y) and _version(s) == before:
            return y
        _interferes(owner, 1)  # from the next call on the first layer's hooks and these see dense activations alone
    return down(h.relu().square())  # type: ignore[no-any-return]


def known_reason(owner: SquaredReLUFFN, recorded: bool) -> str | None:
    """Why the FFN is dense, where that is known without calling the layers; ``recorded`` says that autograd records."""
    for name, layer in zip(owner.names, owner.two_layers, strict=True) if owner.recipe is not None else ():
        if not is_linear(layer):
            return f"its {name} is a {kind_of(layer)}, and a recipe runs an nn.Linear"
        if any(kind.__name__ == "FSDPModule" for kind in type(layer).__mro__):
            return f"FSDP shards its {name} by itself, and a recipe needs both weights at once; shard the FFN"
        backward = layer._backward_hooks or layer._backward_pre_hooks
        if recorded and isinstance(owner.recipe, LayerState) and backward:
            return f"its {name} has backward hooks, and a recipe's step has no gradient of one layer to show them"
    if torch.compiler.is_compiling():
        return None
    state, reason = _interfering.get(owner, (None, None))
    return reason if state is not None and state == _state(owner) else None


def _dense(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    return down(up(x).relu().square())  # type: ignore[no-any-return]


def _state(owner: SquaredReLUFFN) -> object:
    """What tells whether a layer may have come to compute something else: kind, hooks, and an adapter's settings."""
    plain = (bool, int, float, str, list, tuple, type(None))
    everywhere = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    state: list[object] = [tuple(each) for each in everywhere]
    for layer in owner.two_layers:
        state += [type(layer), id(layer.__dict__.get("forward"))]
        state += [tuple(layer._forward_pre_hooks), tuple(layer._forward_hooks)]
        if not is_linear(layer):
            state += [(name, repr(value)) for name, value in layer.__dict__.items() if isinstance(value, plain)]
    return state


def _interferes(owner: SquaredReLUFFN, which: int) -> None:
    """Remember that a layer, the first or the second, computes something else, and fall back."""
    name, layer = owner.names[which], owner.two_layers[which]
    if not is_linear(layer):
        reason = f"its {name} is a {kind_of(layer)}, which computes more than a product with one plain weight"
    elif "forward" in layer.__dict__:
        reason = f"the forward of its {name} was replaced, and does more than observe"
    elif layer._forward_hooks or layer._forward_pre_hooks:
        reason = f"a hook on its {name} changes what goes in or comes out"
    else:
        reason = f"a hook on all modules changes what goes into its {name} or comes out"
    if not torch.compiler.is_compiling():
        _interfering[owner] = (_state(owner), reason)
    owner.fall_back(reason)


def _only_observed(seen: list[tuple[Tensor, Tensor, int | None]], given: Tensor, got: Tensor) -> bool:
    """Whether the layer multiplied what it was given, once, and returned the product as it was."""
    return len(seen) == 1 and seen[0][0] is given and seen[0][1] is got and _version(got) == seen[0][2]


class _Step:
    """One pass through the two layers: the operands as they turn up, and the pruned activations between them.

    Without a recipe the two halves of the operation run one after the other, each while its weight is whole, since FSDP
    takes a layer's weight away after the layer. With a recipe, and in a traced graph, the whole operation runs where
    the second layer does.
    """

    def __init__(self, owner: SquaredReLUFFN, x: Tensor) -> None:
        self.owner = owner
        self.x = x
        self.in_halves = owner.recipe is None and not torch.compiler.is_compiling()
        self.w1_b1: tuple[Tensor, Tensor | None] | None = None
        self.packed: Sparse24 | None = None

    @property
    def pruned(self) -> bool:
        """Whether the second layer is given pruned activations: not where dense is faster or no kernel serves."""
        return self.packed is not None if self.in_halves else self.w1_b1 is not None

    def first(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The dense product that the first layer's hooks see; what comes of it is kept beside."""
        if self.w1_b1 is None and input is self.x and is_plain_weight(weight) and not is_dtensor(weight):
            if self.owner.recipe is not None or not (weight.shape[0] % 8 or weight.shape[1] % 8):
                self.w1_b1 = weight, bias
            if self.in_halves:
                self.packed = self._packed(*autocast(input, weight, bias))  # type: ignore[arg-type]
        return _countable(lambda: linear(input, weight, bias))

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Sparse24 | None:
        rows = x.reshape(-1, x.shape[-1])
        (m, d), f = rows.shape, weight.shape[0]
        reason = kernel_reason(rows, weight, bias)
        if reason is None and f % 8:
            reason = f"a width of {f} is not a positive multiple of 8"
        if reason is not None:
            warn_dense(reason)
            return None
        if self.owner.mode == "auto" and x.is_cuda and m:
            b2 = getattr(self.owner.two_layers[1], "bias", None) is not None
            if ffn_way("auto", x.dtype, bias is not None, b2, m, d, f, x.device) != SPARSE:
                return None
        try:
            return gemm_relu2_24(rows, weight, bias)
        except ToolchainError as error:
            warn_dense(str(error))
            return None

    def shown(self, h: Tensor) -> Tensor:
        """The activations that the second layer and its hooks are given, [..., F], for ``h`` of the first one."""
        packed, recipe = self.packed, self.owner.recipe
        if packed is not None:
            return _countable(lambda: packed.to_dense().view(h.shape))
        if isinstance(recipe, LayerState) and not recipe.recipe.sparse:
            return _countable(lambda: h.relu().square())
        return _countable(lambda: _pruned(h.relu().square()))

    def second(self, s: Tensor, version: int | None) -> Product:
        """The product of the second layer: that of the packed activations, while its input is what was shown."""

        def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if input is not s or _version(s) != version or not is_plain_weight(weight) or is_dtensor(weight):
                return linear(input, weight, bias)
            if (packed := self.packed) is not None:
                _, w2, b2 = autocast(s, weight, bias)
                return _countable(lambda: matmul(packed, w2, b2).view(*s.shape[:-1], weight.shape[0]))  # type: ignore[arg-type]
            assert self.w1_b1 is not None
            w1, b1 = self.w1_b1
            return _countable(lambda: ffn(self.x, w1, weight, b1, bias, mode=self.owner.mode, recipe=self.owner.recipe))

        return product


def _pruned(a: Tensor) -> Tensor:
    rows = a.reshape(-1, a.shape[-1])
    return torch.where(kept_along_features(rows), rows, 0.0).view(a.shape)


def _countable(make: Callable[[], Tensor]) -> Tensor:
    """A tensor that counts its changes, which those made in inference mode do not."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()
