"""The twin of a module: its code on the CPU in float32 with random values and a small F, run to see what it computes.

Nothing of the caller's reaches it: not the default device or type, autocast, inference mode, dispatch modes or hooks.
The random state of every device stays as it was, and no weight is copied.
"""

from __future__ import annotations

import itertools
import random
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from srelu24.nn.layers import is_conv1d, learn_casting, reads_its_weights_alone, widths

F = 48
"""Width between the two layers of a twin."""

SCALES = (1.0, 0.05, 20.0)
"""Of the inputs: an activation that only looks like squared ReLU near 1 is told from it elsewhere."""

_MOST_COPIED = 2**16
"""Elements of a tensor that get values of their own; in a larger one all rows are alike and take no memory."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def neutral() -> Iterator[None]:
    """Foreign code inside finds PyTorch as it starts, and seeded; what it draws changes nobody's random numbers."""
    default, python = torch.get_default_dtype(), random.getstate()
    with ExitStack() as stack:
        for setting in (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            stack.enter_context(setting)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every CUDA device, too
        if default is not torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            random.setstate(python)


@dataclass
class Twin:
    """A twin and what it is made of.

    Attributes:
        module: the twin itself.
        small: the width that stands for one of the original.
        generator: of its values and inputs.
    """

    module: nn.Module
    small: dict[int, int]
    generator: torch.Generator
    _made: dict[int, Any] = field(default_factory=dict)

    def randn(self, *shape: int) -> Tensor:
        """Random values in float32 on the CPU."""
        return torch.randn(*shape, generator=self.generator, device="cpu", dtype=torch.float32)


def twin_of(module: nn.Module, small: dict[int, int]) -> Twin:
    """A twin of ``module`` in which the widths of its own parameters and linear children are replaced by ``small``."""
    twin = Twin(module, small, torch.Generator().manual_seed(0))
    twin.module = _module(module, twin, small)
    return twin


def _module(module: nn.Module, twin: Twin, small: dict[int, int]) -> Any:
    if id(module) in twin._made:
        return twin._made[id(module)]
    made = twin._made[id(module)] = object.__new__(_class_of(module))
    state = dict(module.__dict__)
    for replaced in ("forward", "_compiled_call_impl"):
        state.pop(replaced, None)
    for hooks in _HOOKS:
        if hooks in state:
            state[hooks] = type(state[hooks])()
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: _tensor(tensor, twin, small) for name, tensor in state.pop(kind).items()}
    children: dict[str, Any] = {}
    for name, child in state.pop("_modules").items():  # those that are no linear layers keep their sizes
        resized = small if child is not None and widths(child) is not None else {}
        children[name] = None if child is None else _module(child, twin, resized)
    made.__dict__.update({name: _value(value, twin, small) for name, value in state.items()}, _modules=children)
    if small and widths(module) is not None:
        _resize(made, small)
    if type(made) is nn.Linear and is_parametrized(module):  # its weights are computed, and are not computed here
        for name, shape in (("weight", (made.out_features, made.in_features)), ("bias", (made.out_features,))):
            if is_parametrized(module, name):
                made._parameters[name] = nn.Parameter(twin.randn(*shape), requires_grad=False)
        made._modules.clear()
    return made


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of the twin: of a layer whose class only manages a plain one's weights, ``nn.Linear``."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return nn.Linear if plain else type(module)


def _resize(layer: nn.Module, small: dict[int, int]) -> None:
    for name in ("in_features", "out_features", "nx", "nf"):
        if (size := layer.__dict__.get(name)) in small:
            layer.__dict__[name] = small[size]


def _tensor(tensor: Tensor | None, twin: Twin, small: dict[int, int]) -> Tensor | None:
    if tensor is None:
        return None
    if id(tensor) in twin._made:
        return twin._made[id(tensor)]  # type: ignore[no-any-return]
    shape = [small.get(size, size) for size in tensor.shape]
    elements = torch.Size(shape).numel()
    made: Tensor
    if (tensor.is_floating_point() and elements <= _MOST_COPIED) or tensor.dim() < 2:
        made = twin.randn(*shape) if tensor.is_floating_point() else _integers(tensor, shape)
    elif tensor.is_floating_point():
        made = twin.randn(shape[-1]).expand(shape)
    else:
        made = _integers(tensor, shape)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=False)
    twin._made[id(tensor)] = made
    return made


def _integers(tensor: Tensor, shape: list[int]) -> Tensor:
    if tensor.is_meta or list(tensor.shape) != shape or tensor.numel() > _MOST_COPIED:
        return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(shape)
    return tensor.detach().to("cpu", copy=True)


def _value(value: Any, twin: Twin, small: dict[int, int]) -> Any:
    """A plain attribute: tensors and modules as those of the twin, containers copied, everything else shared."""
    if isinstance(value, Tensor):
        return _tensor(value, twin, small)
    if isinstance(value, nn.Module):
        return twin._made.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in twin._made:
        return types.MethodType(value.__func__, twin._made[id(value.__self__)])
    if type(value) in (list, tuple, set):
        return type(value)(_value(each, twin, small) for each in value)
    if type(value) is dict:
        return {key: _value(each, twin, small) for key, each in value.items()}
    return value


# --------------------------------------------------------------------------------------------------------- its runs


@dataclass(frozen=True)
class Run:
    """One run of a twin: its input, what its linear layers got and gave, its output."""

    twin: nn.Module
    x: Tensor
    seen: dict[str, list[tuple[Tensor, Tensor]]]
    y: object

    def is_product(self, name: str) -> bool:
        """A layer gave ``x W^T + b`` whenever it ran."""
        layer = self.twin.get_submodule(name)
        return all(close(y, product(x, layer)) for x, y in self.seen[name])

    def is_core(self, pair: tuple[str, str]) -> bool:
        """Each layer ran once, and the second one's input is the square of relu of the first one's output."""
        ups, downs = self.seen[pair[0]], self.seen[pair[1]]
        if len(ups) != 1 or len(downs) != 1:
            return False
        h, a = ups[0][1], downs[0][0]
        return h.shape == a.shape and torch.allclose(a, torch.relu(h) * torch.relu(h), rtol=1e-5, atol=0)

    def is_whole(self, pair: tuple[str, str]) -> bool:
        """The module's output is the FFN of its input, computed here from the weights alone, in float64."""
        up, down = (self.twin.get_submodule(name) for name in pair)
        h = product(self.x, up)
        return close(self.y, product(torch.relu(h) ** 2, down))


def product(x: Tensor, layer: Any) -> Tensor:
    """``x W^T + b`` in float64, with W and b of a layer."""
    weight, bias = layer.weight.double(), layer.bias
    y: Tensor = x.double() @ (weight if is_conv1d(layer) else weight.T)
    return y if bias is None else y + bias.double()


def close(y: object, expected: Tensor) -> bool:
    """Whether ``y`` is what was computed in float64, up to the rounding of float32."""
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return torch.allclose(y.double(), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


def runs(twin: Twin, names: Iterator[str] | list[str], d: int) -> Iterator[Run]:
    """The twin on small and large inputs [2, 5, D], in evaluation and in training mode (dropout)."""
    layers = {name: twin.module.get_submodule(name) for name in names}
    for training, scale in itertools.product((False, True), SCALES):
        twin.module.train(training)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

        def record(name: str, into: dict[str, list[tuple[Tensor, Tensor]]]) -> Callable[..., None]:
            return lambda _, args, output: into[name].append((args[0].clone(), output.clone()))

        hooks = [layer.register_forward_hook(record(name, seen)) for name, layer in layers.items()]
        x = twin.randn(2, 5, d) * scale
        y = twin.module(x.clone())
        for hook in hooks:
            hook.remove()
        yield Run(twin.module, x, seen, y)


def is_casting(layer: nn.Module) -> bool:
    """Whether a twin's layer, a subclass of ``nn.Linear`` that computes a product, casts to the type of its input, and
    its code reads nothing that could change that; remembered then."""
    if type(layer).forward is nn.Linear.forward or not isinstance(layer, nn.Linear):
        return False
    if not reads_its_weights_alone(layer):
        return False
    x = torch.ones(3, layer.in_features, device="cpu", dtype=torch.bfloat16)
    bias = None if layer.bias is None else layer.bias.bfloat16()
    try:
        y = layer(x)
    except RuntimeError:  # it does not cast; its weights are of the type of x in every call that works
        y = nn.functional.linear(x, layer.weight.bfloat16(), bias)
    if y.dtype is not torch.bfloat16 or not torch.equal(y, nn.functional.linear(x, layer.weight.bfloat16(), bias)):
        return False
    learn_casting(type(layer))
    return True


class _Outputs(TorchFunctionMode):
    """Keeps the tensors that functions of PyTorch return."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if isinstance(y, Tensor) and y.is_floating_point() and y.dim() > 1:
            self.kept.append(y.detach().clone())
        return y


def squares_relu(twin: Twin, d: int) -> bool:
    """Whether the square of relu of something that has negative values turns up while the twin runs."""
    kept: list[Tensor] = []
    with _Outputs(kept):
        twin.module.eval()(twin.randn(2, 5, d))
    signed = [h for h in kept if bool((h < 0).any())]
    return any(a.shape == h.shape and torch.allclose(a, torch.relu(h).square()) for h in signed for a in kept)
