"""Widths read off a model that needs no memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from srelu24.from_module import ffn_widths, widths_of
from srelu24_gen.errors import Unsupported

MODEL = """
import torch
from torch import nn

class FFN(nn.Module):
    def __init__(self, d, f, gated=False):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d)
        if gated:
            self.gate = nn.Linear(d, f)

class Block(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.ffn = FFN(d, f)

def make():
    assert torch.empty(1).device.type == "meta"
    return nn.ModuleList([Block(18432, 73728), Block(18432, 73728), Block(64, 256), FFN(32, 128, gated=True)])

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


def test_every_width_once_in_the_models_order_without_gated_ones(package: str) -> None:
    assert widths_of(f"{package}:make") == [(18432, 73728), (64, 256)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (":no_ffn", "no module with two Linear layers"),
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


def test_the_order_of_layers_does_not_matter_and_square_ones_are_no_ffn() -> None:
    down_first = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
    square = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 16))
    assert ffn_widths(nn.ModuleList([down_first, square, other])) == [(8, 32)]
    assert torch.get_default_device().type == "cpu"
