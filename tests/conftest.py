"""Tests under tests/gpu carry the marker ``gpu`` and are skipped, with the reason, where no GPU is usable.

They run the kernels of Hopper; with ``--family sm80`` those for every GPU from Ampere on, on whichever is there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"
PORTABLE_MODULES = (
    "test_kernels",
    "test_large",
    "test_ops",
    "test_runtime",
    "test_fp8",
    "test_fp8_forward",
    "test_cutlass_oracle_sm80",
)
"""What is the same for both kernel families. The rest is about tuning and training, which are Hopper's."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-candidate", action="store_true", help="tests/compile/test_every_tile.py compiles all variants."
    )
    parser.addoption("--family", choices=("sm90", "sm80"), default="sm90", help="Kernel family that tests/gpu runs.")


def pytest_configure(config: pytest.Config) -> None:
    if portable(config):  # before any test module is imported: they ask for targets
        os.environ["SRELU24_KERNELS"] = "portable"


def portable(config: pytest.Config) -> bool:
    return config.getoption("--family") == "sm80"


def why_no_gpu(portable: bool) -> str:
    """Empty where kernels can run, else the reason why they cannot."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return "no CUDA device that PyTorch can use"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability[0] < 8 or (capability != (9, 0) and not portable):
        needed = "8.0 or later" if portable else "9.0, others run with --family sm80"
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need {needed}"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu(portable(config)) if gpu_items else ""
    if portable(config):
        for item in gpu_items:
            if item.path.stem not in PORTABLE_MODULES:
                item.add_marker(pytest.mark.skip(reason="there are native kernels only for this"))
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
