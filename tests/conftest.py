"""Tests under tests/gpu carry the marker ``gpu`` and are skipped, with the reason, where no Hopper GPU is usable."""

from __future__ import annotations

from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


def why_no_gpu() -> str:
    """Empty where kernels can run, else the reason why they cannot."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return "no CUDA device that PyTorch can use"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 9.0"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if gpu_items else ""
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
