"""The machine that results come from: whether it has a GPU, and what a result depends on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

import torch

import srelu24_gen
from srelu24.measuring.nvml import Gpu
from srelu24_gen import paths
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.target import Toolchain


def require_gpu(device: torch.device | str, doing: str = "benchmarks time kernels") -> None:
    """Raise Unsupported unless ``device`` is an NVIDIA GPU that PyTorch sees; ``doing`` begins the sentence."""
    if torch.device(device).type != "cuda":
        raise Unsupported(f"{doing} on an NVIDIA GPU and the device is {device}; give cuda")
    if not torch.cuda.is_available():
        raise Unsupported(f"{doing} on an NVIDIA GPU and PyTorch sees none; run `srelu24 doctor` to find out why")


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a result depends on, as plain JSON types; None for what cannot be read."""
    device = torch.device(device)
    gpu = Gpu.open(device)
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    commit, dirty = _git_state()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": properties.name if properties else None,
        "sm_count": properties.multi_processor_count if properties else None,
        "driver": gpu.driver() if gpu else None,
        "power_limit_watts": gpu.power_limit_watts() if gpu else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "cusparselt": torch.backends.cusparselt.version(),
        **_toolchain_versions(),
        "srelu24": srelu24_gen.__version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _toolchain_versions() -> dict[str, str | None]:
    try:
        found = Toolchain.find()
    except Srelu24Error:
        return {"nvrtc": None, "cutlass": None}
    return {"nvrtc": found.nvrtc_version, "cutlass": found.cutlass_version}


def _git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether tracked files differ from it; SRELU24_COMMIT names that of a copy without its .git."""
    if named := os.environ.get("SRELU24_COMMIT"):
        return named, None
    root = paths.checkout()
    if root and (root / ".git").exists():
        try:
            commit, status = (
                subprocess.run(
                    ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
                ).stdout.strip()
                for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
            )
            return commit, bool(status)
        except (OSError, subprocess.SubprocessError):
            pass
    return None, None
