"""What conversion keeps of a module"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import srelu24
from srelu24.nn.modules import SquaredReLUFFN
from srelu24_gen.errors import Unsupported


class MLP(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.layer_idx = 3
        self.config = {"hidden": 32}

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(torch.relu(self.c_fc(x)).square()))

    def flops(self) -> int:
        return 4 * self.c_fc.weight.numel()


class Versioned(MLP):
    """Every way to take part in state dicts."""

    _version = 2

    def get_extra_state(self) -> dict[str, int]:
        return {"idx": self.layer_idx}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.layer_idx = state["idx"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("c_fc", "c_proj"):  # the old layout, transposed
            old = state_dict.pop(f"{prefix}{name}.weight_t", None)
            if old is not None:
                state_dict[f"{prefix}{name}.weight"] = old.T
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "saved_by"] = torch.tensor(7)


def model(kind: type[nn.Module] = MLP, **how: Any) -> nn.Module:
    return nn.Sequential(kind(**how), kind(**how)).bfloat16().eval()


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", srelu24.FallbackWarning)
        yield


def test_the_object_stays() -> None:
    """The module is the same object, still of its class, with its attributes, methods and order of parameters."""
    net = model()
    before, names = list(net), list(dict(net.named_parameters()))
    held = [net[0]]
    srelu24.convert(net)
    assert [a is b for a, b in zip(net, before, strict=True)] == [True, True]
    assert isinstance(net[0], MLP)
    assert isinstance(held[0], SquaredReLUFFN)
    assert (net[0].layer_idx, net[0].config, net[0].flops()) == (3, {"hidden": 32}, 4 * 32 * 96)
    assert list(dict(net.named_parameters())) == names
    assert [name for name, _ in net[0].named_children()] == ["c_fc", "c_proj", "dropout"]


def test_revert_leaves_no_trace() -> None:
    """After revert the module has the class and the attributes it had, and pickles as before."""
    net = model()
    before = [(type(module), set(module.__dict__)) for module in net.modules()]
    report = srelu24.convert(net, recipe=srelu24.Recipe())
    report.revert()
    assert [(type(module), set(module.__dict__)) for module in net.modules()] == before
    report = srelu24.convert(net[0])  # the second layer alone
    report.revert()
    assert [(type(module), set(module.__dict__)) for module in net.modules()] == before


def test_state_dicts() -> None:
    """Extra state, overrides of saving and loading, and state-dict hooks of a module work on as they did."""
    net, source = model(Versioned), model(Versioned)
    log: list[str] = []
    net[0].register_state_dict_pre_hook(lambda *_: log.append("before saving"))
    net[0]._register_state_dict_hook(lambda module, state, prefix, _: log.append("saved"))
    net[0].register_load_state_dict_pre_hook(lambda *_: log.append("before loading"))
    net[0].register_load_state_dict_post_hook(lambda *_: log.append("loaded"))
    expected = net.state_dict()
    srelu24.convert(net)
    log.clear()
    state = net.state_dict()
    assert list(state) == list(expected)
    assert state["0._extra_state"] == {"idx": 3}
    assert state._metadata["0"]["version"] == 2
    assert log == ["before saving", "saved"]

    old = source.state_dict()
    old["0._extra_state"] = {"idx": 11}
    old["0.c_fc.weight_t"] = old.pop("0.c_fc.weight").T
    del old["0.saved_by"], old["1.saved_by"]
    log.clear()
    net.load_state_dict(old)
    assert log == ["before loading", "loaded"]
    assert net[0].layer_idx == 11
    assert torch.equal(net[0].c_fc.weight, source[0].c_fc.weight)


def test_hooks_and_wrappers_between_convert_and_revert() -> None:
    """Hooks, attributes and wrappers that come after convert are there after revert; so is a replaced module."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net, x = model(), torch.randn(3, 32).bfloat16()
    report = srelu24.convert(net)
    called = []
    net[0].register_forward_hook(lambda *_: called.append(1))
    net[0].extra = "kept"
    net[0].register_buffer("scale", torch.ones(1))
    net[1] = wrapper = Wrapper(net[1])
    report.revert()
    assert net[1] is wrapper
    assert not any(isinstance(module, SquaredReLUFFN) for module in net.modules())
    with torch.no_grad():
        net(x)
    assert called == [1]
    assert net[0].extra == "kept"
    assert "scale" in net[0]._buffers


def test_classes_laid_over_after_convert() -> None:
    """Parametrizations put on a converted module's layers, and classes laid over it as FSDP2 does, survive revert."""

    class Laid:
        """As FSDPModule."""

    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    net, mlp = model(), MLP().bfloat16()
    reports = srelu24.convert(net), srelu24.convert(mlp)
    net[0].__class__ = type(f"Laid{type(net[0]).__name__}", (Laid, type(net[0])), {})
    parametrize.register_parametrization(mlp.c_proj, "weight", Twice())
    doubled = mlp.c_proj.weight.clone()
    for report in reports:
        report.revert()
    assert isinstance(net[0], Laid)
    assert isinstance(net[0], MLP)
    assert not isinstance(net[0], SquaredReLUFFN)
    assert not isinstance(mlp.c_proj, srelu24.Linear24)
    assert torch.equal(mlp.c_proj.weight, doubled)
    with torch.no_grad():
        net(torch.randn(3, 32).bfloat16())


def test_a_dropout_that_is_turned_on() -> None:
    """A Dropout(0.0) whose p is set later drops in training, with a warning; in evaluation the FFN goes on pruning."""
    net, x = model(), torch.ones(64, 32).bfloat16()
    assert [done.layer for done in srelu24.convert(net).converted] == ["ffn"] * 2
    with torch.no_grad(), no_warning():
        expected = net(x)
        net[0].dropout.p = 0.5
        assert torch.equal(net(x), expected)
        net.train()
        net[0].dropout.p = 0.0
        assert torch.equal(net(x), expected)
    net[0].dropout.p = 0.5
    for grad in (torch.no_grad, torch.enable_grad):
        srelu24.runtime.fallback.warn_again()
        with grad(), pytest.warns(srelu24.FallbackWarning, match="0: p of a Dropout in it has changed"):
            y = net[0](x)
        assert 0.4 < float((y == 0).double().mean()) < 0.6
    net[0].strict = True
    with pytest.raises(Unsupported, match="has changed since the conversion"):
        net[0](x)


class Flagged(MLP):
    clip = False

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.act: Callable[[Tensor], Tensor] = torch.relu
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self._activated(self.c_fc(x)))
        return self.c_proj(a if not self.clip else a.clamp(max=0.1))

    def _activated(self, h: Tensor) -> Tensor:
        if getattr(self, "cubed", False):
            return self.act(h) ** 3
        return self.act(h).square() if self.scale == 1.0 else self.scale * self.act(h).square()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", True),
        ("scale", 2.0),
        ("act", torch.tanh),
        ("cubed", True),
        ("norm", nn.Tanh()),
        ("norm", nn.Softmax(-1)),
    ],
)
def test_flags_set_later(name: str, value: object) -> None:
    """A flag, an activation or a child that the module's code reads and that changes later: that code runs again."""
    net, x = model(Flagged), torch.randn(6, 32).bfloat16()
    plain = copy.deepcopy(net)
    srelu24.convert(net)
    assert isinstance(net[0], SquaredReLUFFN)
    with torch.no_grad():
        with no_warning():
            expected = net[0](x)
            net[0].layer_idx = 99  # its forward does not read that
            assert torch.equal(net[0](x), expected)
        for each in (net, plain):
            setattr(each[0], name, value)
        with pytest.warns(srelu24.FallbackWarning, match=f"0: its {name} has changed since the conversion"):
            y = net[0](x)
        assert torch.equal(y, plain[0](x))
        assert srelu24.status(net).layers[0].runs == "dense"
        net[1].mode = "sparse"
        setattr(net[1], name, value)
        with pytest.raises(Unsupported, match="1 cannot run pruned"):
            net[1](x)
        for each in net:
            each.__dict__.pop(name, None)
        if name in ("clip", "cubed"):
            with no_warning():
                assert torch.equal(net[0](x), expected)


class Activation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.power = 2

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h) ** self.power


def test_settings_of_children() -> None:
    """Settings of an activation module are watched like the module's own."""
    net, x = (
        nn.Sequential(nn.Sequential(nn.Linear(32, 96), Activation(), nn.Linear(96, 32))).bfloat16(),
        torch.randn(4, 32),
    )
    assert [done.layer for done in srelu24.convert(net).converted] == ["ffn"]
    assert len(net[0]) == 3  # still an nn.Sequential
    net[0][1].power = 3
    with torch.no_grad(), pytest.warns(srelu24.FallbackWarning, match="power of a Activation in it has changed"):
        y = net(x.bfloat16())
    a = torch.relu(net[0][0](x.bfloat16())) ** 3
    assert torch.equal(y, net[0][2](a))


def test_copies_and_pickles() -> None:
    """Converted modules of any class are deep-copied, pickled and saved whole; copies watch their own flags."""
    net, x = model(Versioned), torch.randn(5, 32).bfloat16()
    srelu24.convert(net)
    with torch.no_grad():
        expected = net(x)
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
            assert type(twin[0]) is type(net[0])
            assert torch.equal(twin(x), expected)
            twin[0].dropout.p = 0.5
            twin.train()
            with pytest.warns(srelu24.FallbackWarning):
                twin(x)
            srelu24.runtime.fallback.warn_again()
        with no_warning():
            assert torch.equal(net.train()(x), expected)


def test_names_that_mean_something_else() -> None:
    """A module with attributes that a SquaredReLUFFN has for itself keeps its code; its second layer is swapped."""

    class Modal(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.mode = "fast"

    class Mixed(MLP):
        def set_recipe(self) -> str:
            return "theirs"

    net = nn.Sequential(Modal(), Mixed())
    report = srelu24.convert(net)
    assert [(done.layer, done.note.split(" of")[0]) for done in report.converted] == [
        ("linear24", "it has a 'mode'"),
        ("linear24", "it has a 'set_recipe'"),
    ]
    assert (net[0].mode, net[1].set_recipe()) == ("fast", "theirs")


def test_classes_that_cannot_be_changed() -> None:
    """A module whose class refuses to be changed is left and named."""

    class Fixed(MLP):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__":
                raise TypeError("this class is fixed")
            super().__setattr__(name, value)

    report = srelu24.convert(nn.Sequential(Fixed()))
    assert "the class of a Fixed cannot be changed (this class is fixed)" in report.left[0].why
