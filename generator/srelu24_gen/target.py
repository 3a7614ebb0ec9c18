"""What a kernel is made for (GpuTarget) and made with (Toolchain: NVRTC, CUDA and CUTLASS headers)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from srelu24_gen.errors import ToolchainError, Unsupported

MIB = 1 << 20


@dataclass(frozen=True)
class GpuTarget:
    """Limits of one GPU model; sizes in bytes, registers of 32 bits.

    Source of the per-SM limits: CUDA C++ Programming Guide, compute capability 9.0.
    """

    key: str
    """Short stable name, a folder of ``tuning_db/<arch>/``: h200, h100-pcie."""
    name: str
    """What the CUDA driver calls it."""
    arch: str = "sm_90a"
    sm_count: int = 132
    smem_per_block: int = 232448
    """Largest (opt-in) shared memory of one block."""
    registers_per_sm: int = 65536
    """Also the most one block may use."""
    l2_bytes: int = 50 * MIB
    dense_flops_per_clock: int = 4096
    """Of one multiprocessor's tensor cores on 16-bit operands; with a 2:4 operand twice as many, dense-equivalent."""
    dram_gbps: int = 3350
    """Peak memory bandwidth, GB/s (NVIDIA data sheets)."""
    watts: int = 700
    """Power limit as sold; only the cost model reads it."""


TARGETS: dict[str, GpuTarget] = {
    target.key: target
    for target in (
        GpuTarget("h100", "NVIDIA H100 80GB HBM3"),
        GpuTarget("h100-pcie", "NVIDIA H100 PCIe", sm_count=114, dram_gbps=2000, watts=350),
        GpuTarget("h100-nvl", "NVIDIA H100 NVL", l2_bytes=60 * MIB, dram_gbps=3900, watts=400),
        GpuTarget("h200", "NVIDIA H200", l2_bytes=60 * MIB, dram_gbps=4800),
        GpuTarget("gh200", "NVIDIA GH200 480GB", l2_bytes=60 * MIB, dram_gbps=4000, watts=900),
    )
}


def target_by_key(key: str) -> GpuTarget:
    """The known GPU of that key.

    Raises:
        Unsupported: no such key.
    """
    if key not in TARGETS:
        raise Unsupported(f"there is no GPU target {key!r}; known are {', '.join(TARGETS)}")
    return TARGETS[key]


def target_for_device(
    name: str,
    compute_capability: tuple[int, int],
    sm_count: int,
    *,
    smem_per_block: int = GpuTarget.smem_per_block,
    registers_per_sm: int = GpuTarget.registers_per_sm,
    l2_bytes: int = GpuTarget.l2_bytes,
) -> GpuTarget:
    """The target of a device as its driver describes it.

    A known model keeps its key; any other device of compute capability 9.0 (another name, or a part
    of a known model such as a MIG slice) gets a key made from its name and keeps its own limits, so
    that records never mix.

    Raises:
        Unsupported: another compute capability.
    """
    if compute_capability != (9, 0):
        major, minor = compute_capability
        raise Unsupported(
            f"{name} has compute capability {major}.{minor}; the kernels need 9.0 (Hopper: {', '.join(TARGETS)})"
        )
    for target in TARGETS.values():
        # GH200 modules differ in memory only, which is the tail of their name.
        same_name = name.startswith("NVIDIA GH200 ") if target.key == "gh200" else name == target.name
        if same_name and sm_count == target.sm_count:
            return dataclasses.replace(target, name=name)
    key = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "", 1)).strip("-") or "hopper"
    if key in TARGETS or name in {t.name for t in TARGETS.values()}:
        key = f"{key}-{sm_count}sm"
    return GpuTarget(
        key=key,
        name=name,
        sm_count=sm_count,
        smem_per_block=smem_per_block,
        registers_per_sm=registers_per_sm,
        l2_bytes=l2_bytes,
    )


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles a kernel. All of it comes from PyPI wheels."""

    nvrtc_version: str
    """For example 13.0.88, or 13.0 where NVRTC is not from the wheel."""
    cutlass_version: str
    """For example 4.2.0, as its headers say."""
    include_dirs: tuple[Path, ...]
    """CUTLASS, CUDA runtime, libcu++; without our own headers."""

    @classmethod
    def find(cls) -> Self:
        """Look in this Python environment. The answer is kept for the life of the process.

        Raises:
            ToolchainError: something is missing or does not fit; the message has the pip command that mends it.
        """
        nvrtc, cutlass, dirs = _find_parts()
        return cls(nvrtc, cutlass, dirs)


@functools.cache
def _find_parts() -> tuple[str, str, tuple[Path, ...]]:
    cutlass = _header_dir(
        "cutlass_library", "source/include", "cute/arch/mma_sm90_gmma_sparse.hpp", "nvidia-cutlass==4.*"
    )
    # One folder, filled by several wheels: runtime, crt (compiler internals), cccl (libcu++). It is more than one where
    # the wheels lie in more than one place on the import path.
    cuda = _header_dir("nvidia", "cu13/include", "cuda_fp16.h", "nvidia-cuda-runtime==13.*")
    crt = _header_dir("nvidia", "cu13/include", "crt/host_defines.h", "nvidia-cuda-crt==13.*")
    cccl = _header_dir("nvidia", "cu13/include", "cccl/cuda/std/cstdint", "nvidia-cuda-cccl==13.*")
    major, minor = _nvrtc_version()
    cuda_major = int(_defines(cuda / "cuda.h")["CUDA_VERSION"]) // 1000
    if major != cuda_major:
        raise ToolchainError(
            f"NVRTC is {major}.{minor} but the CUDA headers are {cuda_major}; install the same major version of both"
            f" with: pip install 'nvidia-cuda-nvrtc=={cuda_major}.*'"
        )
    version = _defines(cutlass / "cutlass" / "version.h")
    cutlass_version = ".".join(version[f"CUTLASS_{part}"] for part in ("MAJOR", "MINOR", "PATCH"))
    folders = dict.fromkeys((cutlass, cuda, crt, cccl, cccl / "cccl"))
    return _patch_version(major, minor), cutlass_version, tuple(folders)


def _package_dirs(package: str) -> Iterator[Path]:
    """Folders of a top-level package, found without importing it; a namespace package may have several."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder)


def _header_dir(package: str, subfolder: str, header: str, wheel: str) -> Path:
    for folder in _package_dirs(package):
        if (folder / subfolder / header).is_file():
            return folder / subfolder
    raise ToolchainError(f"the header {header} was not found in this Python environment; run: pip install '{wheel}'")


def _defines(header: Path) -> dict[str, str]:
    """Integer macros of a header."""
    return dict(re.findall(r"^#define\s+(\w+)\s+(\d+)\s*$", header.read_text(), re.MULTILINE))


def _nvrtc_version() -> tuple[int, int]:
    try:
        from cuda.bindings import nvrtc  # here, so that describing and rendering need no CUDA library

        status, major, minor = nvrtc.nvrtcVersion()
    except ImportError as error:
        raise ToolchainError(
            f"cuda-bindings cannot be imported ({error}); run: pip install 'cuda-bindings==13.*'"
        ) from error
    except RuntimeError as error:  # what cuda-pathfinder raises when there is no library to load
        raise ToolchainError("the NVRTC library was not found; run: pip install 'nvidia-cuda-nvrtc==13.*'") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ToolchainError(
            f"NVRTC does not work ({status.name}); run: pip install --force-reinstall nvidia-cuda-nvrtc"
        )
    return major, minor


def _patch_version(major: int, minor: int) -> str:
    """NVRTC itself does not tell its patch level; the wheel it is loaded from first does."""
    try:
        wheel = importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        wheel = ""
    return wheel if wheel.startswith(f"{major}.{minor}.") else f"{major}.{minor}"
