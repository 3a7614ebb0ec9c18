"""Several processes (two, with gloo on the CPU)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both processes run every case once; a file for each case and rank holds its worst distance, or its error."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, worker, str(rank), str(RANKS), str(folder), "cpu"] for rank in range(RANKS)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
    return folder


def worst(results: Path, case: str) -> float:
    """The largest relative distance from a single process, of both ranks."""
    distances = []
    for rank in range(RANKS):
        text = (results / f"{case}.{rank}").read_text()
        try:
            distances.append(float(text))
        except ValueError:
            pytest.fail(f"rank {rank}:\n{text}")
    return max(distances)


def test_ddp(results: Path) -> None:
    """DistributedDataParallel: outputs, and gradients of the whole batch, are those of one process."""
    assert worst(results, "ddp") < 0.02


def test_fsdp2(results: Path) -> None:
    """FSDP2 (fully_shard of every block and the model): outputs and gradients are those of one process."""
    assert worst(results, "fsdp2") < 0.02


def test_fsdp2_of_the_ffn(results: Path) -> None:
    """FSDP2 of each FFN alone."""
    assert worst(results, "fsdp2_of_the_ffn") == 0.0


def test_fsdp2_of_the_linears(results: Path) -> None:
    """FSDP2 of the single Linears: the pruned numbers; a training recipe cannot, and says so or raises."""
    assert worst(results, "fsdp2_of_the_linears") < 1e-6


def test_fsdp2_recipe_state(results: Path) -> None:
    """FSDP2 of a recipe's model on the meta device, filled by assign, with the recipe's state or without."""
    assert worst(results, "fsdp2_recipe_state") == 0.0


def test_profiles(results: Path) -> None:
    """profile and status of tensor-parallel and sharded models: the shares of one process."""
    assert worst(results, "profiles") < 0.01


def test_tensor_parallel(results: Path) -> None:
    """Tensor parallel (SquaredReLUFFNParallel), with and without biases: outputs and gradients of one process."""
    assert worst(results, "tensor_parallel") < 0.02


def test_tensor_parallel_collectives(results: Path) -> None:
    """Tensor parallel moves one all-reduce of Y between the ranks; the packed activations stay."""
    assert worst(results, "tensor_parallel_collectives") == 0.0


def test_sequence_parallel(results: Path) -> None:
    """Sequence parallel: X gathered, Y reduce-scattered along the tokens."""
    assert worst(results, "sequence_parallel") < 0.02


def test_styles_of_the_layers(results: Path) -> None:
    """ColwiseParallel and RowwiseParallel on the two layers work: dense with a warning, refused by mode sparse."""
    assert worst(results, "styles_of_the_layers") < 0.02


def test_refused_widths(results: Path) -> None:
    """Widths that would cut a group of 4 between ranks are refused, as are modules that were not converted."""
    assert worst(results, "refused_widths") == 0.0


def test_recipe_ddp(results: Path) -> None:
    """Training by a recipe under DDP: gradients of one process; each rank counts its own tokens."""
    assert worst(results, "recipe_ddp") < 1e-4


def test_recipe_fsdp2(results: Path) -> None:
    """Training by a recipe under FSDP2: gradients of one process."""
    assert worst(results, "recipe_fsdp2") < 1e-4


def test_refused_recipes(results: Path) -> None:
    """Tensor parallelism by any recipe, and FSDP by an 8-bit one, are refused in one sentence."""
    assert worst(results, "refused_recipes") == 0.0


def test_dtensor_ops(results: Path) -> None:
    """Every op on DTensors, sharded by tokens and along F, against the op on one process."""
    assert worst(results, "dtensor_ops") < 0.02
