"""What the tests of this folder share: small models, and the masked reference that is made without srelu24."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from srelu24.runtime import fallback

torch.set_num_threads(1)  # as in tests/unit


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights in every run; and every test sees its own fallback warnings."""
    torch.manual_seed(0)
    fallback.warn_again()


class MLP(nn.Module):
    """What a model's author writes: relu squared between two linear layers."""

    def __init__(self, d: int = 32, f: int = 96, bias: bool = False) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d, f, bias=bias)
        self.c_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.relu(self.c_fc(x)).square())


class Net(nn.Module):
    """Two residual blocks of norm and MLP under a head that is tied to nothing."""

    def __init__(self, d: int = 32, f: int = 96, bias: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.mlps = nn.ModuleList(MLP(d, f, bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


@pytest.fixture
def mlp() -> MLP:
    return MLP().bfloat16().eval()


@pytest.fixture
def net() -> Net:
    return Net().bfloat16().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, 32).bfloat16()


def keep_two_of_four(a: Tensor) -> Tensor:
    """Zeroes all but the two largest of every four neighbours; the first ones where they tie, which in bf16 they do."""
    groups = a.unflatten(-1, (-1, 4))
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return (groups * torch.zeros_like(groups).scatter_(-1, kept, 1.0)).flatten(-2)


@contextmanager
def _masked(*seconds: nn.Linear) -> Iterator[None]:
    hooks = [each.register_forward_pre_hook(lambda _, args: (keep_two_of_four(args[0]),)) for each in seconds]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def masked() -> Callable[..., object]:
    """A context in which the given second layers of a dense model get their inputs masked: the reference."""
    return _masked


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture
def distance() -> Callable[[Tensor, Tensor], float]:
    """Relative, in the Frobenius norm."""
    return _distance
