"""Serving"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import srelu24
from srelu24_gen.errors import Unsupported
from srelu24_gen.models import Shape


def test_threads(net: nn.Module) -> None:
    """Eight threads share a converted model: every one gets the answers of a single thread."""
    srelu24.convert(net)
    inputs = [torch.randn(1, m, 32).bfloat16() for m in range(1, 33)]
    barrier = threading.Barrier(8)

    def work(part: int) -> list[Tensor]:
        barrier.wait()
        with torch.no_grad():  # a thread's own setting
            return [net(x) for x in inputs[part::8]]

    with torch.no_grad():
        expected = [net(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(work, range(8)))
    for part, outputs in enumerate(parts):
        assert all(torch.equal(y, wanted) for y, wanted in zip(outputs, expected[part::8], strict=True))


_DISABLED = """
import torch, warnings, srelu24
warnings.simplefilter("ignore")
x, w1, w2 = torch.randn(6, 32).bfloat16(), torch.randn(96, 32).bfloat16(), torch.randn(32, 96).bfloat16()
dense = torch.nn.functional.linear(torch.nn.functional.linear(x, w1).relu().square(), w2)
print(torch.equal(srelu24.ffn(x, w1, w2), dense), srelu24.explain(x, w1, w2).why)
"""


@pytest.mark.parametrize(("value", "said"), [("1", "True SRELU24_DISABLE is set"), ("0", "False x is on cpu")])
def test_environment_switch(value: str, said: str) -> None:
    """SRELU24_DISABLE=1 makes everything dense PyTorch, and explain says so."""
    environment = os.environ | {"SRELU24_DISABLE": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", _DISABLED], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.startswith(said)


def test_warmup(net: nn.Module, mlp: nn.Module) -> None:
    """warmup runs each distinct layer once per token count and tells what serves it."""
    srelu24.convert(net)
    srelu24.convert(mlp)  # a bare MLP: its second layer alone
    told = srelu24.warmup(nn.ModuleList([net, mlp]), tokens=[1, 64])
    assert [each.shape for each in told] == [Shape(1, 32, 96), Shape(64, 32, 96)] * 2
    assert [each.explanation and each.explanation.runs for each in told] == ["reference", "reference", None, None]
    assert [each.shape.m for each in srelu24.warmup(net, tokens=3)] == [3]
    for wrong in ([], 0, [4, -1], True, 2.5, [2.5], None, "4"):
        with pytest.raises(Unsupported, match="at least one positive number"):
            srelu24.warmup(net, tokens=wrong)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"Linear has no SquaredReLUFFN or Linear24; convert it"):
        srelu24.warmup(nn.Linear(32, 32), tokens=[1])
    for takes_a_model in (srelu24.convert, lambda model: srelu24.warmup(model, [1]), lambda m: srelu24.profile(m, [])):
        with pytest.raises(Unsupported, match=r"the model is a NoneType; a torch.nn.Module is needed"):
            takes_a_model(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(32,), (1, 32), (3, 0, 32), (2, 3, 4, 32)])
def test_leading_dimensions(mlp: nn.Module, shape: tuple[int, ...]) -> None:
    """One token, no token, and any number of leading dimensions."""
    model = nn.Sequential(mlp)
    srelu24.convert(model)
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        y = model(x)
        assert y.shape == x.shape
        assert torch.equal(y.view(-1, 32), model(x.view(-1, 32)))
