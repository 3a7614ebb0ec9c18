"""Every example runs end to end in its reduced form; with a GPU the same commands run in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "convert_huggingface.py": ["model.layers.1.mlp: FFN, 64x256", "of the most likely tokens", "one FFN: dense"],
    "train_gpt.py": ["blocks.1.ffn: FFN, 64x256 (trains", "the recipe is sparse", "│ blocks.1.ffn │", "sparse: "],
    "tune_new_shape.py": ["candidates; ", "registers", "runs: ", "[1000, 1280]"],
    "extend_template.py": ["compiled: ", " 0 spilled"],
}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--layers", "0"], "'0' is not a whole number from 1"),
        (["--width", "65"], "heads need the same even width"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--steps", "3"], "nothing would be read"),
    ],
)
def test_the_training_example_refuses_what_it_cannot_do(options: list[str], why: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name})" in listed for name in SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SRELU24_CACHE_DIR": str(tmp_path / "cache"),
        "SRELU24_DATA_DIR": str(tmp_path / "data"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # several on a busy machine wait for each other
    }
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in SAYS[name]:
        assert words in done.stdout
    if name == "train_gpt.py":
        assert "<svg" in (tmp_path / "train_gpt.svg").read_text(encoding="utf-8")
