"""Hooks, adapters and offloading: no silent fallback"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import srelu24
from srelu24.nn.modules import SquaredReLUFFN
from srelu24_gen.errors import Unsupported

Distance = Callable[[Tensor, Tensor], float]


@pytest.fixture
def converted(net: nn.Module) -> nn.Module:
    srelu24.convert(net)
    return net


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", srelu24.FallbackWarning)
        yield


class Seen:
    """Hooks that keep what they see and return nothing."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def before(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs.append(args[0].detach().clone())

    def after(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(args[0].detach().clone())
        self.outputs.append(output.detach().clone())


def forward_hook(layer: nn.Module, seen: Seen) -> None:
    layer.register_forward_hook(seen.after)


def pre_hook(layer: nn.Module, seen: Seen) -> None:
    layer.register_forward_pre_hook(seen.before)


def with_keywords(layer: nn.Module, seen: Seen) -> None:
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.before(module, args), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, kwargs, y: seen.after(module, args, y), with_kwargs=True)


def always_called(layer: nn.Module, seen: Seen) -> None:
    layer.register_forward_hook(seen.after, always_call=True)


def hands_on(layer: nn.Module, seen: Seen) -> None:
    """Returns what it was given, as FSDP's and Dynamo's do."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.after(module, args, output)
        return output

    layer.register_forward_pre_hook(lambda _, args: args)
    layer.register_forward_hook(hook)


def replaced_forward(layer: nn.Module, seen: Seen) -> None:
    """As accelerate's add_hook_to_module does."""
    old = layer.forward

    def new(module: nn.Module, *args: Tensor) -> Tensor:
        seen.before(module, args)
        y = old(*args)
        seen.outputs.append(y.detach().clone())
        return y

    layer._old_forward = old  # type: ignore[assignment]
    layer.forward = functools.update_wrapper(functools.partial(new, layer), old)  # type: ignore[method-assign]


OBSERVERS = (forward_hook, pre_hook, with_keywords, always_called, hands_on, replaced_forward)


@pytest.mark.parametrize("mode", ["auto", "sparse"])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("observe", OBSERVERS, ids=lambda f: f.__name__)
def test_observers_change_nothing(
    observe: Callable[..., None], grad: Any, mode: str, mlp: nn.Module, x: Tensor
) -> None:
    """Hooks and replaced forwards that observe: the same bits, no warning; they see what goes into Linears and out."""
    ffn = SquaredReLUFFN.of(mlp.c_fc, mlp.c_proj, ("c_fc", "c_proj"), mode)
    with grad(), no_warning():
        expected = ffn(x)
        up, down = Seen(), Seen()
        observe(ffn.up, up)
        observe(ffn.down, down)
        assert torch.equal(ffn(x), expected)
        assert torch.equal(ffn(x=x), expected)
        assert torch.equal(up.inputs[0], x)
        a = down.inputs[0]
        h = nn.functional.linear(x, ffn.up.weight)
        assert ((a.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert torch.equal(a != 0, (a != 0) & (h > 0))
        if up.outputs:
            assert torch.equal(up.outputs[0], h)
            assert torch.equal(down.outputs[0], expected)


def test_global_hooks(converted: nn.Module, x: Tensor) -> None:
    """Hooks on all modules of the process see the Linears, too; the numbers stay."""
    with torch.no_grad(), no_warning():
        expected = converted(x)
        seen: list[nn.Module] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
        try:
            assert torch.equal(converted(x), expected)
        finally:
            handle.remove()
        assert converted.mlps[0].up in seen
        assert converted.mlps[1].down in seen
        count = len(seen)
        assert torch.equal(converted(x), expected)
        assert len(seen) == count


def adds_one(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _, args, y: y + 1)


def adds_one_in_place(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _, args, y: (y.add_(1), None)[1])


def adds_one_before(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _, args: (args[0] + 1,))


def computes_more(layer: nn.Module) -> None:
    old = layer.forward
    layer.forward = lambda x: old(x) + 1  # type: ignore[method-assign]


CHANGERS = {adds_one: "hook on its", adds_one_before: "hook on its", computes_more: "the forward of its"}


@pytest.mark.parametrize("where", ["c_fc", "c_proj"])
@pytest.mark.parametrize("change", [*CHANGERS, adds_one_in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_what_changes_numbers_is_named(
    change: Callable[[nn.Module], None], where: str, grad: Any, net: nn.Module, x: Tensor
) -> None:
    """Hooks and forwards that change a Linear's numbers: dense with them, one warning with layer and cause."""
    dense = copy.deepcopy(net)
    srelu24.convert(net)
    for model in (net, dense):
        change(model.mlps[1].get_submodule(where))
    with grad():
        with pytest.warns(
            srelu24.FallbackWarning, match=rf"mlps\.1: .*{CHANGERS.get(change, 'hook on its')} {where}"
        ) as warned:
            y = net.mlps[1](x)
        assert len(warned) == 1
        assert torch.equal(y, dense.mlps[1](x))
        with no_warning():
            assert torch.equal(net.mlps[1](x), y)
            assert not torch.equal(net.mlps[0](x), dense.mlps[0](x))  # the others prune
        assert [row.runs for row in srelu24.status(net)] == ["reference", "dense"]
        assert where in srelu24.status(net).layers[1].why


@pytest.mark.parametrize("how", ["sparse", "strict"])
@pytest.mark.parametrize("where", ["c_fc", "c_proj"])
@pytest.mark.parametrize("change", [*CHANGERS, adds_one_in_place], ids=lambda f: f.__name__)
def test_sparse_and_strict_refuse(
    change: Callable[[nn.Module], None], where: str, how: str, net: nn.Module, x: Tensor
) -> None:
    """mode="sparse" and convert(strict=True) raise instead, naming the layer and the cause."""
    srelu24.convert(net, mode="sparse" if how == "sparse" else "auto", strict=how == "strict")
    with torch.no_grad():
        net(x)
        change(net.mlps[1].get_submodule(where))
        for _ in range(2):
            with pytest.raises(Unsupported, match=rf"mlps\.1 cannot run pruned, and .*{how}.*{where}"):
                net(x)
        assert [row.runs for row in srelu24.status(net)] == ["reference", "error"]


def test_hooks_that_go_and_come(converted: nn.Module, x: Tensor) -> None:
    """Pruned again once a hook is removed; a hook that only observes beside one that changed is judged anew."""
    ffn = converted.mlps[0]
    with torch.no_grad():
        expected = ffn(x)
        handle = ffn.up.register_forward_hook(lambda _, args, y: 2 * y)
        with pytest.warns(srelu24.FallbackWarning):
            assert not torch.equal(ffn(x), expected)
        handle.remove()
        with no_warning():
            assert torch.equal(ffn(x), expected)
            ffn.up.register_forward_hook(lambda *_: None)
            assert torch.equal(ffn(x), expected)


class Adapter(nn.Module):
    """As adapter libraries put it in a layer's place: the layer, plus a low-rank product while it is on."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a = nn.Linear(base.in_features, 4, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(4, base.out_features, bias=False, dtype=base.weight.dtype)
        self.disabled = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.disabled else (y + self.b(self.a(x))).to(y.dtype)


@pytest.mark.parametrize("where", ["c_fc", "c_proj"])
def test_adapters(where: str, converted: nn.Module, x: Tensor) -> None:
    """An adapter that is off changes nothing; one that is on makes the FFN dense with a warning; and off again."""
    ffn = converted.mlps[0]
    with torch.no_grad():
        expected = ffn(x)
        adapter = Adapter(ffn.get_submodule(where))
        setattr(ffn, where, adapter)
        assert srelu24.status(converted).layers[0].runs == "unknown"
        with no_warning():
            assert torch.equal(ffn(x), expected)
        adapter.disabled = False
        with pytest.warns(srelu24.FallbackWarning, match=rf"mlps\.0: its {where} is a Adapter"):
            y = ffn(x)
        assert torch.equal(y, ffn.c_proj(ffn.c_fc(x).relu().square()))
        adapter.disabled = True
        with no_warning():
            assert torch.equal(ffn(x), expected)
        ffn.mode = "sparse"
        adapter.disabled = False
        with pytest.raises(Unsupported, match="cannot run pruned"):
            ffn(x)


def test_wrappers_that_hand_on(converted: nn.Module, x: Tensor) -> None:
    """nn.Sequential around a Linear, and a quantised weight: the first is the Linear, the second is named."""
    ffn = converted.mlps[0]
    with torch.no_grad():
        expected = ffn(x)
        ffn.c_fc = nn.Sequential(ffn.c_fc)
        with no_warning():
            assert torch.equal(ffn(x), expected)
        ffn.c_fc = nn.Sequential(ffn.c_fc[0], nn.Tanh())
        with pytest.warns(srelu24.FallbackWarning, match="its c_fc is a Sequential"):
            ffn(x)


class Offloaded:
    """As accelerate's AlignDevicesHook with offload: the weight is on the meta device outside of the forward."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.kept, old = layer, layer.weight.detach().clone(), layer.forward
        layer.weight = nn.Parameter(layer.weight.to("meta"))

        def new(*args: Tensor) -> Tensor:
            layer.weight = nn.Parameter(self.kept.clone())
            y = old(*args)
            layer.weight = nn.Parameter(layer.weight.to("meta"))
            return y

        layer.forward = new  # type: ignore[method-assign]


def test_offloading(converted: nn.Module, x: Tensor) -> None:
    """Weights that come and go with each layer's forward: the pruned numbers."""
    with torch.no_grad(), no_warning():
        expected = converted(x)
        for ffn in converted.mlps:
            Offloaded(ffn.up)
            Offloaded(ffn.down)
        assert torch.equal(converted(x), expected)
        assert converted.mlps[0].up.weight.is_meta


def test_convert_after_hooks(net: nn.Module, x: Tensor) -> None:
    """Models whose Linears have hooks or replaced forwards already are converted, and prune as others do."""
    plain = copy.deepcopy(net)
    for mlp, observe in zip(net.mlps, (forward_hook, replaced_forward), strict=True):
        observe(mlp.c_fc, Seen())
        observe(mlp.c_proj, Seen())
    for model in (net, plain):
        assert [done.layer for done in srelu24.convert(model).converted] == ["ffn"] * 2
    with torch.no_grad(), no_warning():
        assert torch.equal(net(x), plain(x))


def test_hooked_weights(net: nn.Module, x: Tensor) -> None:
    """weight_norm by a hook, and torch.nn.utils.prune: the weight that the hook makes is the one."""
    for mlp in net.mlps:
        torch.manual_seed(1)
        prune.l1_unstructured(mlp.c_fc, "weight", 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(mlp.c_proj)
    expected = SquaredReLUFFN(32, 96, dtype=torch.bfloat16)
    assert len(srelu24.convert(net).converted) == 2
    with torch.no_grad(), no_warning():
        y = net.mlps[0](x)
        expected.up.weight.copy_(net.mlps[0].c_fc.weight)
        expected.down.weight.copy_(net.mlps[0].c_proj.weight)
        assert torch.equal(y, expected(x))


class Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w * 1.5


def test_parametrizations_are_computed_once(net: nn.Module, x: Tensor) -> None:
    """A parametrized weight is computed once a forward and not by convert, profile's looking or status."""
    counted = [Counted(), Counted()]
    nn.utils.parametrize.register_parametrization(net.mlps[0].c_fc, "weight", counted[0])
    nn.utils.parametrize.register_parametrization(net.mlps[0].c_proj, "weight", counted[1])
    parametrizations.spectral_norm(net.mlps[1].c_fc)
    before = [each.calls for each in counted], copy.deepcopy(net.mlps[1].train().state_dict())
    assert len(srelu24.convert(net).converted) == 2
    assert len(srelu24.status(net)) == 2
    assert [each.calls for each in counted] == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in net.mlps[1].state_dict().items())
    with torch.no_grad():
        net(x)
    assert [each.calls - n for each, n in zip(counted, before[0], strict=True)] == [1, 1]


@pytest.mark.parametrize("recipe", ["rowwise", "predicted", "static"])
def test_8_bit_recipes(recipe: str, net: nn.Module, x: Tensor) -> None:
    """The same of an 8-bit recipe: observers keep the 8-bit numbers, what changes them is named."""
    srelu24.convert(net, recipe=recipe)
    if recipe == "static":
        srelu24.calibrate(net, [x])
    ffn = net.mlps[0]
    with torch.no_grad(), no_warning():
        expected = ffn(x)
        seen = Seen()
        forward_hook(ffn.down, seen)
        pre_hook(ffn.up, seen)
        assert torch.equal(ffn(x), expected)
        assert torch.equal(seen.outputs[0], expected)
    ffn.up.register_forward_hook(lambda _, args, y: 2 * y)
    with torch.no_grad(), pytest.warns(srelu24.FallbackWarning, match=r"mlps\.0: a hook on its c_fc"):
        assert torch.equal(ffn(x), ffn.down(ffn.up(x).relu().square()))


@pytest.mark.parametrize("warmup", [0, 9])
def test_training_recipes(warmup: int, net: nn.Module) -> None:
    """A training recipe goes on under observers, in warm-up and sparse: the same gradients, and losses on what hooks
    see have theirs."""
    net = net.float().train()
    x = torch.randn(4, 8, 32)
    found = []
    for observed in (False, True):
        model = copy.deepcopy(net)
        srelu24.convert(model, recipe=srelu24.Recipe(warmup_steps=warmup))
        up, down = Seen(), Seen()
        if observed:
            forward_hook(model.mlps[0].up, up)
            forward_hook(model.mlps[0].down, down)
        with no_warning():
            model(x).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        assert int(model.mlps[0].recipe.rows) == 32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    density = (down.inputs[0].unflatten(-1, (-1, 4)) != 0).sum(-1).max()
    assert density <= 2 if warmup == 0 else density > 2

    losses: list[Tensor] = []
    model.mlps[1].up.register_forward_hook(lambda _, args, h: losses.append(h.square().mean()))
    model.zero_grad()
    model(x)
    losses[0].backward()
    assert model.mlps[1].up.weight.grad.abs().sum() > 0


def test_training_recipe_with_backward_hooks(net: nn.Module) -> None:
    """Backward hooks on a Linear cannot see a recipe's step: dense with a warning, and an error where strict."""
    net, x = net.float().train(), torch.randn(4, 8, 32)
    srelu24.convert(net, recipe=srelu24.Recipe(warmup_steps=0))
    seen: list[object] = []
    net.mlps[0].up.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append(grad_output))
    with pytest.warns(srelu24.FallbackWarning, match=r"mlps\.0: its c_fc has backward hooks"):
        net(x).square().mean().backward()
    assert len(seen) == 1
    with torch.no_grad(), no_warning():
        net(x)  # nothing of a backward pass, nothing in the way
    net.mlps[0].strict = True
    with pytest.raises(Unsupported, match="backward hooks"):
        net(x)


def test_training_without_a_recipe_with_hooks(net: nn.Module, x: Tensor) -> None:
    """Training without a recipe is dense, with the usual warning; all hooks on the Linears see it."""
    dense = copy.deepcopy(net)
    srelu24.convert(net)
    seen: list[object] = []
    net.mlps[0].up.register_full_backward_hook(lambda *_: seen.append(1))
    net.mlps[0].down.register_forward_hook(lambda *_: seen.append(2))
    with pytest.warns(srelu24.FallbackWarning, match="gradients are recorded"):
        net(x).float().square().mean().backward()
    dense(x).float().square().mean().backward()
    assert seen == [2, 1]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), dense.parameters(), strict=True))


def test_autocast_under_hooks(x: Tensor) -> None:
    """Under autocast a float32 module with observers gives the bits it gives without."""
    ffn = SquaredReLUFFN(32, 96, bias=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), no_warning():
        expected = ffn(x.float())
        seen = Seen()
        forward_hook(ffn.up, seen)
        forward_hook(ffn.down, seen)
        y = ffn(x.float())
    assert torch.equal(y, expected)
    assert y.dtype == seen.outputs[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str, net: nn.Module, x: Tensor) -> None:
    """torch.compile(fullgraph) of a model with observing and changing hooks gives the eager numbers."""
    srelu24.convert(net)
    seen = Seen()
    net.mlps[0].up.register_forward_hook(lambda *_: None)
    net.mlps[0].down.register_forward_pre_hook(lambda *_: None)
    net.mlps[1].up.register_forward_hook(lambda _, args, y: y + 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", srelu24.FallbackWarning)
        expected = net(x)
        torch.compiler.reset()
        assert torch.equal(torch.compile(net, fullgraph=True, backend=backend)(x), expected)
        torch.compiler.reset()
    assert not seen.inputs


def test_copies_and_pickles_with_hooks(converted: nn.Module, x: Tensor) -> None:
    """A model that was seen to fall back is copied and pickled like any other."""
    computes_more_hook = functools.partial(_plus_one)
    converted.mlps[0].up.register_forward_hook(computes_more_hook)
    with torch.no_grad():
        with pytest.warns(srelu24.FallbackWarning):
            y = converted(x)
        assert torch.equal(copy.deepcopy(converted)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(converted.mlps[0]))(x), converted.mlps[0](x))


def _plus_one(_: nn.Module, args: object, y: Tensor) -> Tensor:
    return y + 1


def test_strict(net: nn.Module, mlp: nn.Module, x: Tensor) -> None:
    """strict turns every fallback of a layer into an error with its name: type, gradients; not the CPU itself."""
    srelu24.convert(net, strict=True)
    srelu24.convert(mlp, strict=True)  # the second layer alone
    with torch.no_grad(), no_warning():
        net(x)
        mlp(x)
    with pytest.raises(Unsupported, match=r"mlps\.0 would run dense: gradients are recorded.*strict"):
        net(x)
    with pytest.raises(Unsupported, match=r"c_proj would run dense: gradients are recorded"):
        mlp(x)
    with torch.no_grad(), pytest.raises(Unsupported, match=r"mlps\.0 would run dense: the type is torch\.float32"):
        net.float()(x.float())
    assert srelu24.status(net).layers[0].runs == "dense"
    with pytest.warns(srelu24.FallbackWarning), torch.no_grad():  # others of the process are not strict
        SquaredReLUFFN(32, 96)(x.float())
    net.mlps[0].strict = net.mlps[1].strict = False
    with torch.no_grad():
        net(x.float())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_strict_compiled(backend: str, net: nn.Module, x: Tensor) -> None:
    """Compiled code of a strict model gives the eager numbers, and is refused where eager code is."""
    srelu24.convert(net, strict=True)
    with torch.no_grad():
        expected = net(x)
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x[:, :3]), net(x[:, :3]))
    for run in (lambda: compiled(x), lambda: torch.no_grad()(compiled)(x.float())):
        torch.compiler.reset()
        with pytest.raises(Exception, match=r"Observed exception|would run dense"):
            run()
        net.float()
    torch.compiler.reset()


_STRICT = """
import torch, srelu24
ffn = srelu24.SquaredReLUFFN(32, 96)
ffn.qualified_name = "blocks.3.mlp"
w = ffn.up.weight, ffn.down.weight
for call in (lambda: ffn(torch.randn(2, 32)), lambda: srelu24.ffn(torch.randn(2, 32), *w)):
    try:
        with torch.no_grad():
            call()
        print("ran")
    except srelu24_gen.errors.Unsupported as error:
        print(error)
"""


@pytest.mark.parametrize(("value", "said"), [("1", "blocks.3.mlp would run dense: the type is"), ("0", "ran")])
def test_strict_environment(value: str, said: str) -> None:
    """SRELU24_STRICT=1 does so for the whole process, functions included."""
    environment = os.environ | {"SRELU24_STRICT": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", "import srelu24_gen.errors\n" + _STRICT]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].startswith(said)
    assert ("a call would run dense" in out[1]) == (value == "1")


def test_status(net: nn.Module, mlp: nn.Module, x: Tensor) -> None:
    """status: a row for every FFN and token count, converted or not; printable, iterable, json; nothing is run."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(96, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).relu().square() * self.up(x))

    model = nn.ModuleDict({"net": net, "gated": Gated(), "late": copy.deepcopy(mlp)})
    recipe = srelu24.Recipe(warmup_steps=3)
    srelu24.convert(net, filter=lambda name, _: name == "mlps.0", recipe="static")
    srelu24.convert(net, recipe=recipe)
    srelu24.convert(mlp, mode="dense")
    model["second"] = mlp
    with no_warning():
        found = srelu24.status(model, [1, 512])
    rows = {(row.path, row.tokens): row for row in found}
    assert len(found) == len(rows) == 2 * 5
    assert rows["net.mlps.0", 1].runs == "error"
    assert "calibrate" in rows["net.mlps.0", 1].why
    assert (rows["net.mlps.1", 512].mode, rows["net.mlps.1", 512].runs) == ("training recipe", "dense")
    assert "warm-up of 3 steps" in rows["net.mlps.1", 512].why
    assert rows["gated", 1].why.startswith("gated")
    assert rows["late", 1].why == "not converted; srelu24.convert(model) does it"
    assert (rows["second.c_proj", 1].layer, rows["second.c_proj", 1].runs) == ("linear24", "dense")
    assert all((row.d_model, row.d_ff) == (32, 96) for row in found)
    lines = str(found).splitlines()
    assert len(lines) == 11
    assert lines[0].split() == ["layer", "is", "DxF", "tokens", "mode", "runs", "record", "why"]
    assert '"tokens": 512' in found.json()
    for _ in range(3):
        recipe.step()
    assert srelu24.status(net, 4).layers[1].runs == "reference"
    for wrong in ([], 0, True, 2.5, None, "4"):
        with pytest.raises(Unsupported, match="at least one positive number"):
            srelu24.status(net, wrong)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"a torch\.nn\.Module is needed"):
        srelu24.status(None)  # type: ignore[arg-type]
