"""The two linear layers of an FFN: which layers compute ``x W^T + b`` and nothing else, and what W and b are.

Beside ``nn.Linear`` these are its subclasses that say the same in other words, such as those that cast the weight to
the type of x, and the ``Conv1D`` of transformers, which holds W^T.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from srelu24.runtime.operands import is_dtensor


class Operands(NamedTuple):
    """What a layer multiplies by: weight [N, K], bias [N]."""

    weight: Tensor
    bias: Tensor | None


def operands(layer: nn.Module | None, x: Tensor) -> Operands | None:
    """The operands of a layer whose call is no more than a product with them; None where hooks, a replaced forward or
    the layer's kind have a say. A parametrized weight is computed, once. The weight of a layer that casts it to the
    type of ``x`` is cast."""
    if type(layer) is nn.Linear:  # the usual case at once: this runs before every call
        parameters = layer._parameters
        weight = parameters.get("weight")
        plain = type(weight) is nn.Parameter and "bias" in parameters  # not where a hook makes one of them
        if plain and not _has_hooks(layer) and "forward" not in layer.__dict__:
            return Operands(weight, parameters["bias"])  # type: ignore[arg-type]
    return _other_operands(layer, x)


def _other_operands(layer: nn.Module | None, x: Tensor) -> Operands | None:
    if layer is None or _has_hooks(layer) or "forward" in layer.__dict__:
        return None
    if is_conv1d(layer):
        weight, bias = _parameters_of(layer)
        return Operands(weight.t().to(x.dtype).contiguous(), bias.to(x.dtype))
    if not isinstance(layer, nn.Linear):
        return None
    if type(layer).forward is nn.Linear.forward:
        weight = layer.weight
        return Operands(weight, layer.bias) if is_plain_weight(weight) else None
    if type(layer) not in _casting:
        return None
    weight, bias = layer.weight, layer.bias
    if not is_plain_weight(weight):
        return None
    return Operands(weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def is_plain(layer: nn.Module | None) -> bool:
    """Whether calling ``layer`` is no more than a product with its weight; parametrized weights are weights, and are
    not computed here."""
    return is_linear(layer) and not _has_hooks(layer) and "forward" not in layer.__dict__  # type: ignore[arg-type]


def is_linear(layer: nn.Module | None) -> bool:
    """The same by the kind of the layer and of its weight alone: hooks and a replaced forward do not count."""
    if layer is not None and is_conv1d(layer):
        return True
    if not isinstance(layer, nn.Linear):
        return False
    if type(layer).forward is not nn.Linear.forward and type(layer) not in _casting:
        return False
    return is_parametrized(layer, "weight") or is_plain_weight(getattr(layer, "weight", None))


def is_plain_weight(weight: Tensor | None) -> bool:
    """A tensor, or one whose kind the operations know; a quantised one is its layer's own business."""
    if type(weight) is nn.Parameter:
        return True
    subclass: bool = is_traceable_wrapper_subclass(weight)
    if weight is None or not subclass:
        return weight is not None
    if not is_dtensor(weight):
        return False
    if not torch.compiler.is_compiling():
        import srelu24.ops.sharding  # noqa: F401 (the rules; whoever has such a weight has loaded what this imports)
    return True


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def any_global_hook() -> bool:
    """Whether a hook on all modules of the process sees calls."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


# ------------------------------------------------------------------------------------------------- kinds of layers


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is a ``Conv1D`` of transformers, asked by name: [..., K] times its weight [K, N] plus its bias."""
    names = ((kind.__name__, kind.__module__) for kind in type(layer).__mro__)
    return not isinstance(layer, nn.Linear) and ("Conv1D", "transformers.pytorch_utils") in names


def widths(layer: nn.Module | None) -> tuple[int, int] | None:
    """Widths in and out of what acts as a linear layer, adapters around one included; None for other modules."""
    if layer is not None and is_conv1d(layer):
        k, n = _parameters_of(layer)[0].shape
        return int(k), int(n)
    both = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return both if isinstance(both[0], int) and isinstance(both[1], int) else None  # type: ignore[return-value]


def kind_of(layer: nn.Module) -> str:
    """The name of its class; where that is "Linear" and not PyTorch's, with the module that it comes from."""
    kind = type(layer)
    named_alike = kind.__name__ == "Linear" and kind is not nn.Linear
    return f"{kind.__module__}.{kind.__qualname__}" if named_alike else kind.__name__


def as_linear(layer: nn.Module) -> nn.Module:
    """The layer; for a ``Conv1D`` an ``nn.Linear`` of the same numbers, to be asked and not to be kept."""
    if not is_conv1d(layer):
        return layer
    weight, bias = _parameters_of(layer)
    return linear_of(weight.t().contiguous(), bias)


def _parameters_of(conv1d: Any) -> tuple[Tensor, Tensor]:
    """Weight [K, N] and bias [N]."""
    return conv1d.weight, conv1d.bias


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ``nn.Linear`` of these very tensors, weight [N, K]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made._parameters["weight"] = weight  # type: ignore[assignment]
    made._parameters["bias"] = bias  # type: ignore[assignment]
    return made


_casting: set[type[nn.Module]] = set()
"""Subclasses of ``nn.Linear`` that were proven to cast weight and bias to the type of x and to do nothing else."""


def learn_casting(kind: type[nn.Module]) -> None:
    """Remember that layers of this kind cast; what proves it is in :mod:`srelu24.nn.twin`."""
    _casting.add(kind)


def reads_its_weights_alone(layer: nn.Module) -> bool:
    """Whether the code of a layer's forward reads none of its attributes but weight and bias, so that what was proven
    of one layer holds for all of the kind and for ever."""
    names = set(_names(type(layer).forward.__code__)) if hasattr(type(layer).forward, "__code__") else {"getattr"}
    own = {name for kind in type(layer).__mro__[: type(layer).__mro__.index(nn.Linear)] for name in vars(kind)}
    own |= set(layer.__dict__) | set(layer._buffers) | set(layer._modules) | set(layer._parameters)
    return names.isdisjoint((own - {"weight", "bias", "forward"}) | {"getattr", "vars", "__dict__"})


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
