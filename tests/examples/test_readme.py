"""The README's Python runs as it stands, on the CPU and at small widths."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

README = Path(__file__).parents[2] / "README.md"
SMALLER = {"16384": "256", "4096": "64", '"cuda"': '"cpu"'}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


def test_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names = {
        "h": torch.randn(64, 256, dtype=torch.bfloat16),
        "model": nn.Sequential(MLP(), MLP()).bfloat16(),
        "batch": torch.randn(8, 64, dtype=torch.bfloat16),
    }
    for block in blocks:
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, str(README), "exec"), names)
    y = names["y"]
    assert isinstance(y, Tensor)
    assert y.shape == (64, 64)
    assert y.isfinite().all()
