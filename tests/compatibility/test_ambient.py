"""Ambient settings: default device and type, autocast, inference mode, random state"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import srelu24
from srelu24.nn.modules import Linear24, SquaredReLUFFN


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.relu(self.c_fc(x)).square())


class Dropping(MLP):
    """Makes tensors by factories, and differs in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return functional.dropout(y, 0.5, self.training) * torch.ones(32) + torch.zeros(())


class GELU(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x)))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """As accelerate's init_empty_weights: whatever is registered goes to the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


AMBIENT: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default type bf16": lambda: default_dtype(torch.bfloat16),
    "default type fp16": lambda: default_dtype(torch.float16),
    "default type float64": lambda: default_dtype(torch.float64),
    "with meta": lambda: torch.device("meta"),
    "default device meta": lambda: default_device("meta"),
    "default device cuda": lambda: default_device("cuda"),  # which this machine need not have
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "fake tensors": FakeTensorMode,
    "FLOPs counted": lambda: FlopCounterMode(display=False),
    "init_empty_weights": parameters_on_meta,
}


def model() -> nn.Module:
    return nn.Sequential(MLP(), Dropping(), GELU(), nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32)))


@pytest.mark.parametrize("ambient", AMBIENT)
def test_convert_under(ambient: str) -> None:
    """convert does the same under every default device and type, autocast, inference mode and dispatch mode."""
    net = model()
    before = torch.get_default_dtype()
    with AMBIENT[ambient]():
        report = srelu24.convert(net)
    assert [(done.path, done.layer) for done in report.converted] == [("0", "ffn"), ("1.c_proj", "linear24")]
    assert [left.why for left in report.left] == [
        "its activation is GELU, not squared ReLU",
        "its activation is ReLU, not squared ReLU",
    ]
    assert "training mode" in report.converted[1].note
    assert torch.get_default_dtype() is before


@pytest.mark.parametrize("ambient", [name for name in AMBIENT if name not in ("fake tensors", "init_empty_weights")])
def test_profile_under(ambient: str) -> None:
    """profile finds the same shares under each of them; under autocast and other types those of what then runs."""
    net, x = nn.Sequential(MLP(), MLP()), torch.randn(40, 32)
    expected = srelu24.profile(net, x).layers
    with AMBIENT[ambient]():
        found = srelu24.profile(net, x).layers
    for a, b in zip(found, expected, strict=True):
        assert (a.path, a.tokens) == (b.path, b.tokens)
        assert a.density == pytest.approx(b.density, abs=0.01)
        assert a.energy_dropped == pytest.approx(b.energy_dropped, abs=0.01)


@pytest.mark.parametrize("ambient", ["default type bf16", "with meta", "default device cuda", "inference mode"])
def test_calibrate_under(ambient: str) -> None:
    """calibrate gives the same scales under each of them, and the model then runs outside of it."""
    net, x = nn.Sequential(MLP()).bfloat16(), torch.randn(8, 32).bfloat16()
    srelu24.convert(net, recipe="static")
    (expected,) = (recipe.amax for recipe in srelu24.calibrate(net, [x]))
    with AMBIENT[ambient]():
        (found,) = (recipe.amax for recipe in srelu24.calibrate(net, [x]))
    assert found == expected
    with torch.no_grad():
        assert net(x).isfinite().all()


def test_models_made_under() -> None:
    """A model made in inference mode, in bf16, on the meta device or in float64 is converted like any other."""
    with torch.inference_mode():
        made = [model()]
    with torch.device("meta"):
        made.append(model())
    made += [model().bfloat16(), model().double()]
    for net in made:
        assert [done.path for done in srelu24.convert(net).converted] == ["0", "1.c_proj"]
        assert isinstance(net[0], SquaredReLUFFN)
        assert isinstance(net[1].c_proj, Linear24)


class Drawing(MLP):
    """Draws random numbers whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(()) * random.random()


def test_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """convert and profile leave every generator as it was and touch no CUDA one: ranks keep their own draws."""
    for name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a CUDA generator was touched"))
    seeded: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)  # it seeds all devices
    monkeypatch.setattr(torch.random, "manual_seed", seeded.append)
    net = nn.Sequential(MLP(), Drawing(), Dropping())
    before, python = torch.get_rng_state(), random.getstate()
    srelu24.profile(nn.Sequential(net[0]), torch.ones(4, 32))
    srelu24.convert(net)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert not seeded


def test_hooks_and_containers_of_the_model_are_not_run() -> None:
    """What conversion runs is a twin: the model's hooks are not called, and its lists not appended to."""

    class Listing(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[int] = []
            self.nested = {"calls": self.calls}

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            self.nested["calls"].append(2)
            return super().forward(x)

    net, called = nn.Sequential(Listing()), []
    net[0].c_fc.register_forward_hook(lambda *_: called.append(1))
    net[0].register_forward_pre_hook(lambda *_: called.append(1))
    srelu24.convert(net)
    assert not net[0].calls
    assert not called


class Tower(nn.Module):
    """A block that holds its FFN's layers beside others that are larger, and a table that is no parameter."""

    def __init__(self, d: int = 512, f: int = 2048) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)
        self.register_buffer("table", torch.randn(1024, d))
        self.cache = torch.randn(1024, d)
        self.everything: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        x = x + self.o(weights @ self.v(x)) + self.table[:1] + self.cache[:1]
        return x + self.fc2(self.fc1(x).relu().square())


def test_the_twin_copies_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a model takes the memory of the layers' small twins, whatever else the modules hold or refer to."""
    net = nn.Sequential(*(Tower() for _ in range(4)))
    for tower in net:
        tower.everything.append(net)
    made = []
    for factory in ("randn", "zeros", "empty"):
        monkeypatch.setattr(torch, factory, counting(getattr(torch, factory), made))
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda *_: pytest.fail("a tensor was copied"))
    report = srelu24.convert(net)
    assert [done.layer for done in report.converted] == ["linear24"] * 4
    assert max(made) <= 512 * 48


def counting(factory: Callable[..., Tensor], made: list[int]) -> Callable[..., Tensor]:
    def counted(*args: object, **how: object) -> Tensor:
        tensor = factory(*args, **how)
        made.append(0 if tensor.is_meta else tensor.numel())
        return tensor

    return counted
