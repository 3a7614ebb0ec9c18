"""Finding the squared-ReLU FFNs of a model: by structure, then proven by running a small twin of every candidate.

A candidate is a module with two linear children, F wide between them, or with two matrices of such sizes. Names and
classes prove nothing, so its twin (:mod:`srelu24.nn.twin`) is run, and what goes in and out of its layers tells what
the code between them computes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from srelu24.nn import twin as twins
from srelu24.nn.layers import as_linear, is_conv1d, is_plain_weight, kind_of, widths
from srelu24.nn.modules import Conv1D24, Linear24, SquaredReLUFFN, are_free
from srelu24.nn.raw import RawMatrices
from srelu24.nn.twin import Run
from srelu24_gen.errors import Unsupported

_MOST_ELEMENTS = 2**28
"""The most numbers that a twin may hold: a module with more is not one FFN, but a whole model or a wide attention."""

_MOST_AT_FULL_WIDTH = 2**24
"""In the layers of a twin that only runs with the original's F."""

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
        names: of the two linear children; of two parameters, where the module has ``raw`` ones.
        kind: "ffn", the whole module is a squared-ReLU FFN; "core", only what lies between the two layers is a squared
            ReLU; "other", neither.
        why: for "core" and "other", what stands against a squared-ReLU FFN.
    """

    path: str
    module: nn.Module
    names: tuple[str, str]
    kind: Literal["ffn", "core", "other"]
    why: str = ""
    raw: RawMatrices | None = None

    @property
    def up(self) -> nn.Module:
        """First layer, D -> F; one that holds its weight in another form, as an ``nn.Linear`` to be asked."""
        return self.raw.layers(self.module)[0] if self.raw else as_linear(self.module.get_submodule(self.names[0]))

    @property
    def down(self) -> nn.Module:
        """Second layer, F -> D, as :attr:`up`."""
        return self.raw.layers(self.module)[1] if self.raw else as_linear(self.module.get_submodule(self.names[1]))

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
            both = [widths(module.get_submodule(name)) or (0, 0) for name in site.names]
            if site.kind != "other" or any(k != n for k, n in both):
                sites.append(site)  # the projections of attention are square pairs, and no news
        elif raw := _examine_raw(path, module):
            sites.append(raw)
        elif any(_is_squared_relu(child) for child in module.children()):
            why = "its squared ReLU is not between two linear layers among its children"
            sites.append(Site(path, module, ("", ""), "other", why))
    return sites


def why_nothing(model: nn.Module) -> str:
    """One sentence about a model that has no candidate."""
    modules = list(model.modules())
    if ours := sum(isinstance(module, SquaredReLUFFN | Linear24 | Conv1D24) for module in modules):
        return f"nothing to convert: {ours} layers of the {type(model).__name__} were converted before"
    linear = sum(widths(module) is not None for module in modules)
    return (
        f"nothing to convert: none of the {len(modules)} modules of the {type(model).__name__} holds two layers or "
        f"matrices D -> F -> D with code of its own between them; {linear} are linear layers"
    )


def check_module(model: object) -> None:
    """Raise Unsupported unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise Unsupported(f"the model is a {type(model).__name__}; a torch.nn.Module is needed.")


def _is_squared_relu(module: nn.Module) -> bool:
    """Whether a module without parameters is the activation; PyTorch's own modules are not, and are not run."""
    holds = itertools.chain(module.children(), module.parameters(), module.buffers())
    if type(module).__module__.startswith("torch.nn.") or next(holds, None) is not None:
        return False
    try:
        with twins.neutral():
            h = torch.linspace(-3, 3, 13)
            return torch.equal(twins.twin_of(module, {}).module(h.clone()), torch.relu(h).square())
    except Exception:  # Foreign code on an input it may not expect.
        return False


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Widths of the children that act as linear layers, adapters around one included."""
    others = {name: child for name, child in module.named_children() if not isinstance(child, Linear24 | Conv1D24)}
    return {name: both for name, child in others.items() if (both := widths(child)) is not None}


def _find_pairs(module: nn.Module) -> list[list[tuple[str, str]]]:
    """Children D -> F and F -> D: those with F >= D, then those with F < D, which are the same in the other order.

    Where D = F, attention has such children too: its twin will not run.
    """
    wide: list[tuple[str, str]] = []
    narrow: list[tuple[str, str]] = []
    for (up, (d, f)), (down, (k, n)) in itertools.permutations(_linears(module).items(), 2):
        if (f, d) == (k, n):
            (wide if f >= d else narrow).append((up, down))
    return [pairs for pairs in (wide, narrow) if pairs]


def _examine(path: str, module: nn.Module, pairs: list[tuple[str, str]]) -> Site:
    """The verdict on one candidate; the pair that proves to be a squared ReLU counts, else the first."""
    first = pairs[0]
    names = list(dict.fromkeys(itertools.chain(*pairs)))
    for name in names:
        if reason := _why_no_layer(module.get_submodule(name)):
            return Site(path, module, first, "other", f"{name} is a {reason}")
    if "forward" in module.__dict__:
        return Site(path, module, first, "other", "its forward was replaced on the instance")
    small = _small(module, pairs)
    if _elements(module, small) > _MOST_ELEMENTS:
        return Site(path, module, first, "other", "it holds far more than an FFN")
    linears = _linears(module)
    try:
        with twins.neutral():
            try:
                runs = list(twins.runs(twins.twin_of(module, small), names, linears[first[0]][0]))
            except Exception:  # something else than the layers may be F wide, such as a norm
                if not small or sum(k * n for k, n in linears.values()) > _MOST_AT_FULL_WIDTH:
                    raise
                runs = list(twins.runs(twins.twin_of(module, {}), names, linears[first[0]][0]))
            for name in names:
                layer = module.get_submodule(name)
                if not all(run.is_product(name) for run in runs):
                    why = f"{name} is a {kind_of(layer)}, which computes something else than x W^T + b"
                    return Site(path, module, first, "other", why)
                twins.is_casting(runs[0].twin.get_submodule(name))
    except Exception as error:  # Foreign code on an input it may not expect: whatever it raises, it is left alone.
        reason = f"it does not run on one tensor [2, 5, D] ({type(error).__name__}: {_first_line(error)})"
        return Site(path, module, first, "other", _gated(pairs) or reason)
    with twins.neutral():
        for pair in pairs:
            if all(run.is_core(pair) for run in runs[: len(twins.SCALES)]):  # training may drop out between them
                why = _why_not_whole(module, pair, runs)
                return Site(path, module, pair, "core" if why else "ffn", why)
        return Site(path, module, first, "other", _gated(pairs) or _what_is_there(first, runs))


def _why_no_layer(layer: nn.Module) -> str:
    """Empty for a layer whose call may be a product with its weight; hooks and what only the instance has replaced are
    judged when it runs."""
    if is_conv1d(layer):
        return ""
    if not isinstance(layer, nn.Linear):
        return f"{kind_of(layer)}, no nn.Linear"
    if "weight" in layer._parameters and not is_plain_weight(layer._parameters["weight"]):
        return f"{kind_of(layer)} with a quantised weight, a {type(layer._parameters['weight']).__name__}"
    return ""


def _small(module: nn.Module, pairs: list[tuple[str, str]]) -> dict[int, int]:
    """F of the pairs becomes small in the twin, unless something has it for its D."""
    linears = _linears(module)
    wide = {linears[up][1] for up, _ in pairs}
    return dict.fromkeys(wide, twins.F) if wide.isdisjoint(linears[up][0] for up, _ in pairs) else {}


def _elements(module: nn.Module, small: dict[int, int]) -> int:
    """Numbers in the parameters and buffers of a module's twin."""
    linears = [module.get_submodule(name) for name in _linears(module)]
    inside = {id(t): t for layer in linears for t in layer.parameters()}
    tensors = itertools.chain(module.parameters(), module.buffers())
    besides = sum(t.numel() for t in tensors if id(t) not in inside)
    return besides + sum(torch.Size([small.get(n, n) for n in t.shape]).numel() for t in inside.values())


def _examine_raw(path: str, module: nn.Module) -> Site | None:
    """The verdict on a module that holds two matrices itself; None where there is no squared ReLU."""
    matrices = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 2}
    if len(matrices) < 2 or "forward" in module.__dict__:
        return None
    more = None
    for (first, w1), (second, w2) in itertools.permutations(matrices.items(), 2):
        sizes = sorted(w1.shape)
        for d, f in (sizes, sizes[::-1]) if sorted(w2.shape) == sizes else ():
            small = {f: twins.F} if f != d else {}
            if _elements(module, small) > _MOST_ELEMENTS:
                continue
            try:
                with twins.neutral():
                    runs = list(twins.runs(twins.twin_of(module, small), [], d))
                    for raw in RawMatrices.candidates(module, first, second, d, f):
                        if all(raw.is_ffn(run.twin, run.x, run.y) for run in runs[: len(twins.SCALES)]):
                            return _raw_site(path, module, raw, runs)
                    if more is None and twins.squares_relu(twins.twin_of(module, small), d):
                        why = (
                            "its matrices are parameters of its own, and it does more with them than a squared-ReLU FFN"
                        )
                        more = Site(path, module, ("", ""), "other", why)
            except Exception:  # Foreign code that does not run on such an input is no FFN.
                continue
    return more


def _raw_site(path: str, module: nn.Module, raw: RawMatrices, runs: list[Run]) -> Site:
    why = _why_other_state(module, {name for name in raw.tensors if name})
    if not all(raw.is_ffn(run.twin, run.x, run.y) for run in runs):
        why = "it differs in training mode, as with dropout"
    if not path:
        why = why or "the model itself cannot be replaced in place"
    if why:
        return Site(path, module, raw.names, "other", f"its two matrices are parameters of its own, and {why}", raw)
    return Site(path, module, raw.names, "ffn", raw=raw)


def _inputs_of(module: nn.Module) -> list[inspect.Parameter]:
    """Of the module's forward, without self."""
    return list(inspect.signature(module.forward).parameters.values())


def _why_not_whole(module: nn.Module, pair: tuple[str, str], runs: list[Run]) -> str:
    """Empty where the module can be replaced as a whole."""
    inputs = _inputs_of(module)
    if len(inputs) != 1 or inputs[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return "its forward takes more than one input"
    evaluation, training = runs[: len(twins.SCALES)], runs[len(twins.SCALES) :]
    if not all(run.is_whole(pair) for run in evaluation):
        return "it does more than the FFN, such as a gate, a shift or a scale"
    if not all(run.is_whole(pair) for run in training):
        return "it differs in training mode, as with dropout"
    if why := _why_other_state(module, set(pair)):
        return why
    if not are_free(pair):
        return "its layers have names that a module uses itself"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return ""


def _why_other_state(module: nn.Module, ours: set[str]) -> str:
    """Empty where the module's code depends on nothing that may change but its layers and attributes of its own."""
    layers = [module.get_submodule(name) for name in ours & module._modules.keys()]
    owned = {id(t) for layer in layers for t in itertools.chain(layer.parameters(), layer.buffers())}
    owned |= {id(module._parameters[name]) for name in ours & module._parameters.keys()}
    if any(id(t) not in owned for t in itertools.chain(module.parameters(), module.buffers())):
        return "it holds parameters or buffers besides the two layers"
    mine = {*module.__dict__, *module._modules, *module._parameters, *dir(type(module))}
    taken = sorted(_RESERVED & mine - {"up", "down"} - ours)
    return f"it has a {taken[0]!r} of its own, which means something else to a SquaredReLUFFN" if taken else ""


_RESERVED = SquaredReLUFFN.__annotations__.keys() | (set(dir(SquaredReLUFFN)) - set(dir(nn.Module)))


def _gated(pairs: list[tuple[str, str]]) -> str:
    """Says so where two layers widen to the F that the second one takes; empty where not."""
    down = pairs[0][1]
    ups = [up for up, other in pairs if other == down]
    return f"gated: {' and '.join(ups)} both feed {down}" if len(ups) > 1 else ""


def _what_is_there(pair: tuple[str, str], runs: list[Run]) -> str:
    """What lies between the two layers, named where it is known."""
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
