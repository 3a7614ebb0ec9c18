"""Widths read off a model that needs no memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from srelu24.nn.from_module import widths_of
from srelu24_gen.errors import Unsupported

MODEL = """
import srelu24
import torch
from torch import nn

class FFN(nn.Module):
    def __init__(self, d, f, gated=False):
        super().__init__()
        self.down, self.up = nn.Linear(f, d), nn.Linear(d, f)
        self.gate = nn.Linear(d, f) if gated else None

    def forward(self, x):
        h = torch.relu(self.up(x)).square()
        return self.down(h if self.gate is None else h * self.gate(x))

class GELU(FFN):
    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))

class Block(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.ffn = FFN(d, f)

def make():
    assert torch.empty(1).device.type == "meta"
    converted = srelu24.SquaredReLUFFN(64, 256)
    return nn.ModuleList([converted, Block(18432, 73728), Block(18432, 73728), FFN(32, 128, gated=True), GELU(8, 32)])

def other():
    return nn.ModuleList([GELU(8, 32)])

def no_ffn():
    return nn.Linear(8, 8)

def broken():
    raise RuntimeError("needs a file\\nand more")

def number():
    return 7
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_model_of_tests.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("a_model_of_tests", None)
    return "a_model_of_tests"


def test_every_width_once_and_no_other_kind_of_ffn(package: str) -> None:
    assert widths_of(f"{package}:make") == [(64, 256), (18432, 73728)]
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (":no_ffn", "no_ffn has no squared-ReLU FFN; give"),
        (":other", r"no squared-ReLU FFN \(0: its activation is GELU, not squared ReLU\)"),
        (":broken", "failed on the meta device with RuntimeError: needs a file"),
        (":number", "gave a int"),
        (":missing", "cannot be imported"),
        ("", "not package.module:factory"),
        (":", "not package.module:factory"),
    ],
)
def test_what_does_not_work_is_one_sentence(package: str, name: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as error:
        widths_of(f"{package}{name}")
    assert "\n" not in str(error.value)
    with pytest.raises(Unsupported, match="cannot be imported"):
        widths_of("no_such_package_of_tests:make")
