"""Finding the squared-ReLU FFNs of a model: by structure, then proven by running a small twin of every candidate.

A candidate is a module with two linear children, F wide between them. Names and classes prove nothing, so its twin
(a copy in float32 on the CPU with random weights and a small F) is run, and what goes in and out of its layers tells
what the code between them computes.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from srelu24.nn.modules import Linear24, SquaredReLUFFN, are_free, is_plain
from srelu24_gen.errors import Unsupported

_TWIN_F = 48
_MOST_ELEMENTS = 2**28
"""The most numbers that a twin may hold: a module with more is not one FFN, but a whole model or a wide attention."""

_SCALES = (1.0, 0.05, 20.0)
"""Of the twin's inputs: an activation that agrees with squared ReLU only near 1 differs from it at another scale."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": torch.relu,
    "SiLU": nn.functional.silu,
    "GELU": nn.functional.gelu,
    "tanh GELU": lambda h: nn.functional.gelu(h, approximate="tanh"),
    "quick GELU": lambda h: h * torch.sigmoid(1.702 * h),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "square": torch.square,
    "identity": lambda h: h,
}


@dataclass(frozen=True)
class Site:
    """A candidate: where it is and what its twin showed.

    Attributes:
        path: qualified name in the model, "" for the model itself.
        names: of the two linear children.
        kind: "ffn", the whole module is a squared-ReLU FFN; "core", only what lies between the two layers is a squared
            ReLU; "other", neither.
        why: for "core" and "other", what stands against a squared-ReLU FFN.
    """

    path: str
    module: nn.Module
    names: tuple[str, str]
    kind: Literal["ffn", "core", "other"]
    why: str = ""

    @property
    def up(self) -> nn.Module:
        """First layer, D -> F."""
        return self.module.get_submodule(self.names[0])

    @property
    def down(self) -> nn.Module:
        """Second layer, F -> D."""
        return self.module.get_submodule(self.names[1])

    @property
    def input_name(self) -> str:
        """The keyword by which a whole FFN takes its input."""
        return _inputs_of(self.module)[0].name


def find(model: nn.Module) -> list[Site]:
    """Every candidate of the model, in the order of ``named_modules``. Modules of srelu24 itself are no candidates.

    Raises:
        Unsupported: the model is no module.
    """
    check_module(model)
    sites = []
    for path, module in model.named_modules():
        if isinstance(module, SquaredReLUFFN):
            continue
        if pairs := _find_pairs(module):
            site = _examine(path, module, pairs[0])
            for others in pairs[1:]:
                if site.kind == "other":
                    found = _examine(path, module, others)
                    site = site if found.kind == "other" else found
            if site.kind != "other" or any(u.in_features != u.out_features for u in (site.up, site.down)):
                sites.append(site)  # but not the projections of attention, which are square pairs and nothing to report
        elif any(_is_squared_relu(child) for child in module.children()):
            why = "its squared ReLU is not between two linear layers among its children"
            sites.append(Site(path, module, ("", ""), "other", why))
    return sites


def check_module(model: object) -> None:
    """Raise Unsupported unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise Unsupported(f"the model is a {type(model).__name__}; a torch.nn.Module is needed.")


def _is_squared_relu(module: nn.Module) -> bool:
    """Whether a module without parameters is the activation; PyTorch's own modules are not, and are not run."""
    holds = itertools.chain(module.children(), module.parameters(), module.buffers())
    if type(module).__module__.startswith("torch.nn.") or next(holds, None) is not None:
        return False
    h = torch.linspace(-3, 3, 13, device="cpu")
    try:
        return torch.equal(module(h.clone()), torch.relu(h).square())
    except Exception:  # Foreign code on an input it may not expect.
        return False


def _find_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Children that act as linear layers, adapters around one included."""
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(getattr(child, "in_features", None), int)
        and isinstance(getattr(child, "out_features", None), int)
        and not isinstance(child, Linear24)
    }


def _find_pairs(module: nn.Module) -> list[list[tuple[str, str]]]:
    """Children D -> F and F -> D: those with F >= D, then those with F < D, which are the same in the other order.

    Where D = F, attention has such children too: its twin will not run.
    """
    wide: list[tuple[str, str]] = []
    narrow: list[tuple[str, str]] = []
    for (up_name, up), (down_name, down) in itertools.permutations(_find_linears(module).items(), 2):
        if up.out_features == down.in_features and up.in_features == down.out_features:
            widens = int(up.out_features) >= int(up.in_features)  # type: ignore[arg-type]
            (wide if widens else narrow).append((up_name, down_name))
    return [pairs for pairs in (wide, narrow) if pairs]


@torch.no_grad()
def _examine(path: str, module: nn.Module, pairs: list[tuple[str, str]]) -> Site:
    """The verdict on one candidate; the pair that proves to be a squared ReLU counts, else the first."""
    first = pairs[0]
    for name in dict.fromkeys(itertools.chain(*pairs)):
        child = module.get_submodule(name)
        if not is_plain(child):
            kind = type(child).__name__
            extra = "with hooks, an adapter or a quantised weight" if isinstance(child, nn.Linear) else "no nn.Linear"
            return Site(path, module, first, "other", f"{name} is a {kind}, {extra}")
    if "forward" in module.__dict__:
        return Site(path, module, first, "other", "its forward was replaced on the instance")
    if _count_elements(module, pairs) > _MOST_ELEMENTS:
        return Site(path, module, first, "other", "it holds far more than an FFN")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            runs = list(_run_twin(module, pairs))
    except Exception as error:  # Foreign code on an input it may not expect: whatever it raises, it is left alone.
        reason = f"it does not run on one tensor [2, 5, D] ({type(error).__name__}: {_first_line(error)})"
        return Site(path, module, first, "other", _describe_gate(module, pairs) or reason)
    for pair in pairs:
        if all(run.is_core(pair) for run in runs):
            why = _why_not_whole(module, pair, runs)
            return Site(path, module, pair, "core" if why else "ffn", why)
    return Site(path, module, first, "other", _describe_gate(module, pairs) or _name_what_is_between(first, runs))


@dataclass(frozen=True)
class _Run:
    """One run of a twin: its input, the inputs and outputs of its linear layers, and its output."""

    twin: nn.Module
    x: Tensor
    seen: dict[str, list[tuple[Tensor, Tensor]]]
    y: object

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
        h = _apply_linear(self.x.double(), up)
        y = _apply_linear(torch.relu(h) ** 2, down)
        if not isinstance(self.y, Tensor) or self.y.shape != y.shape:
            return False
        return torch.allclose(self.y.double(), y, rtol=1e-4, atol=float(y.abs().max()) * 1e-5)


def _apply_linear(x: Tensor, layer: nn.Module) -> Tensor:
    y = x @ layer.weight.double().T  # type: ignore[operator]
    return y if layer.bias is None else y + layer.bias.double()  # type: ignore[operator]


def _run_twin(module: nn.Module, pairs: list[tuple[str, str]]) -> Iterator[_Run]:
    """The twin on small and large inputs, in evaluation and in training mode (dropout)."""
    twin = _make_twin(module, pairs)
    layers = {name: twin.get_submodule(name) for name in dict.fromkeys(itertools.chain(*pairs))}
    d = int(layers[pairs[0][0]].in_features)  # type: ignore[arg-type]
    for training, scale in itertools.product((False, True), _SCALES):
        twin.train(training)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

        def record(name: str, into: dict[str, list[tuple[Tensor, Tensor]]]) -> Callable[..., None]:
            return lambda _, args, output: into[name].append((args[0].clone(), output.clone()))

        hooks = [layer.register_forward_hook(record(name, seen)) for name, layer in layers.items()]
        x = torch.randn(2, 5, d) * scale
        y = twin(x.clone())
        for hook in hooks:
            hook.remove()
        yield _Run(twin, x, seen, y)


def _count_elements(module: nn.Module, pairs: list[tuple[str, str]]) -> int:
    """Numbers in the parameters and buffers of a module's twin."""
    children = {id(t) for child in _find_linears(module).values() for t in child.parameters()}
    tensors = itertools.chain(module.parameters(), module.buffers())
    besides = sum(t.numel() for t in tensors if id(t) not in children)
    return besides + sum(i * o for i, o in _twin_sizes(module, pairs).values())


def _twin_sizes(module: nn.Module, pairs: list[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Widths in and out of the twin's linear children: F is small, unless something has it for its D."""
    sizes = {
        name: (int(child.in_features), int(child.out_features))  # type: ignore[arg-type]
        for name, child in _find_linears(module).items()
    }
    widths = {sizes[up][1] for up, _ in pairs}
    small = dict.fromkeys(widths, _TWIN_F) if widths.isdisjoint(sizes[up][0] for up, _ in pairs) else {}
    return {name: (small.get(i, i), small.get(o, o)) for name, (i, o) in sizes.items()}


def _make_twin(module: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """A copy in float32 on the CPU with random values everywhere, F made small; large weights are never copied."""
    sizes = _twin_sizes(module, pairs)
    memo: dict[int, object] = {}
    for name, child in _find_linears(module).items():
        fresh = nn.Linear(*sizes[name], bias=child.bias is not None, device="cpu", dtype=torch.float32)
        memo[id(child)] = fresh
    children = {id(t) for child in _find_linears(module).values() for t in child.parameters()}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and id(tensor) not in children:
            values = torch.randn(tensor.shape, device="cpu", dtype=torch.float32)
            memo[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
    if hasattr(module, "config"):
        memo[id(module.config)] = module.config
    return copy.deepcopy(module, memo)


def _inputs_of(module: nn.Module) -> list[inspect.Parameter]:
    """Of the module's forward, without self."""
    return list(inspect.signature(module.forward).parameters.values())


def _why_not_whole(module: nn.Module, pair: tuple[str, str], runs: list[_Run]) -> str:
    """Empty where the module can be replaced as a whole."""
    inputs = _inputs_of(module)
    if len(inputs) != 1 or inputs[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return "its forward takes more than one input"
    evaluation, training = runs[: len(_SCALES)], runs[len(_SCALES) :]
    if not all(run.is_whole(pair) for run in evaluation):
        return "it does more than the FFN, such as a gate, a shift or a scale"
    if not all(run.is_whole(pair) for run in training):
        return "it differs in training mode, as with dropout"
    owned = {id(t) for name in pair for t in module.get_submodule(name).parameters()}
    if any(id(t) not in owned for t in itertools.chain(module.parameters(), module.buffers())):
        return "it holds parameters or buffers besides the two layers"
    if not are_free(pair):
        return "its layers have names that a module uses itself"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return ""


def _describe_gate(module: nn.Module, pairs: list[tuple[str, str]]) -> str:
    """A sentence where two layers widen to the F that the second one takes, as in a gated FFN; else empty."""
    down = pairs[0][1]
    ups = [up for up, other in pairs if other == down]
    return f"gated: {' and '.join(ups)} both feed {down}" if len(ups) > 1 else ""


def _name_what_is_between(pair: tuple[str, str], runs: list[_Run]) -> str:
    """A sentence about what lies between the two layers, with the activation's name where it is known."""
    layers = [(run.seen[pair[0]], run.seen[pair[1]]) for run in runs]
    if any(len(ups) != 1 or len(downs) != 1 for ups, downs in layers):
        return f"{pair[0]} and {pair[1]} do not run once each"
    pairs = [(ups[0][1], downs[0][0]) for ups, downs in layers]
    for name, activation in _ACTIVATIONS.items():
        if all(h.shape == a.shape and torch.allclose(a, activation(h), rtol=1e-3, atol=1e-5) for h, a in pairs):
            return f"its activation is {name}, not squared ReLU"
    return f"what lies between {pair[0]} and {pair[1]} is no squared ReLU"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
