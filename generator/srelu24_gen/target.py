"""What a kernel is made for (GpuTarget) and made with (Toolchain: NVRTC, CUDA and CUTLASS headers)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.spec import instructions_of

KIB = 1 << 10
MIB = 1 << 20
SYSTEM_SHARED_BYTES = KIB
"""Of a multiprocessor's shared memory, what the system takes for each block."""


@dataclass(frozen=True)
class GpuTarget:
    """Limits of one GPU model, and what its kernels are compiled for; sizes in bytes, registers of 32 bits.

    Sources: per-SM limits, CUDA C++ Programming Guide, "Compute Capabilities"; the rest, NVIDIA's data sheets and
    architecture white papers.
    """

    key: str
    """Short stable name, a folder of ``tuning_db/<arch>/``: h200, h100-pcie."""
    name: str
    """What the CUDA driver calls it."""
    arch: str = "sm_90a"
    """What NVRTC is told; :func:`srelu24_gen.spec.instructions_of` says which kernel family that is."""
    sm_count: int = 132
    smem_per_block: int = 227 * KIB
    """Largest (opt-in) shared memory of one block."""
    registers_per_sm: int = 65536
    """Also the most one block may use."""
    l2_bytes: int = 50 * MIB
    dense_flops_per_clock: int = 4096
    """Of one multiprocessor's tensor cores on 16-bit operands summed in fp32; with a 2:4 operand twice as many,
    dense-equivalent."""
    dram_gbps: int = 3350
    """Peak memory bandwidth, GB/s (NVIDIA data sheets)."""
    watts: int = 700
    """Power limit as sold; only the cost model reads it."""
    clock_mhz: int = 1980
    """The highest clock of a multiprocessor; only the cost model reads it."""

    @property
    def kernels(self) -> str:
        """The kernel family in words, as ``explain`` has it: "native kernels (wgmma)"."""
        instructions = instructions_of(self.arch)
        return f"{instructions.kind} kernels ({instructions.value})"

    @property
    def portable(self) -> Self:
        """The same GPU with the portable kernel family instead of a native one."""
        return dataclasses.replace(self, arch=self.arch.removesuffix("a"))


def _ampere(key: str, name: str, sm_count: int, l2_mib: int, dram_gbps: int, watts: int) -> GpuTarget:
    limits = {"smem_per_block": 163 * KIB, "dense_flops_per_clock": 2048, "clock_mhz": 1410}
    return GpuTarget(key, name, "sm_80", sm_count, l2_bytes=l2_mib * MIB, dram_gbps=dram_gbps, watts=watts, **limits)


def _small(
    key: str, name: str, arch: str, sm_count: int, l2_mib: int, dram_gbps: int, watts: int, flops: int
) -> GpuTarget:
    """Of compute capability 8.6, 8.9 or 12.0, which have 99 KiB of shared memory a block."""
    limits = {"smem_per_block": 99 * KIB, "dense_flops_per_clock": flops}
    return GpuTarget(key, name, arch, sm_count, l2_bytes=l2_mib * MIB, dram_gbps=dram_gbps, watts=watts, **limits)


TARGETS: dict[str, GpuTarget] = {
    target.key: target
    for target in (
        GpuTarget("h100", "NVIDIA H100 80GB HBM3"),
        GpuTarget("h100-pcie", "NVIDIA H100 PCIe", sm_count=114, dram_gbps=2000, watts=350, clock_mhz=1755),
        GpuTarget("h100-nvl", "NVIDIA H100 NVL", l2_bytes=60 * MIB, dram_gbps=3900, watts=400, clock_mhz=1785),
        GpuTarget("h200", "NVIDIA H200", l2_bytes=60 * MIB, dram_gbps=4800),
        GpuTarget("gh200", "NVIDIA GH200 480GB", l2_bytes=60 * MIB, dram_gbps=4000, watts=900),
        GpuTarget("gh200-144gb", "NVIDIA GH200 144G HBM3e", l2_bytes=60 * MIB, dram_gbps=4900, watts=900),
        # Its tensor cores do a quarter of an H100's work a clock, which no driver says.
        GpuTarget(
            "h20", "NVIDIA H20", sm_count=78, l2_bytes=60 * MIB, dense_flops_per_clock=1024, dram_gbps=4000, watts=500
        ),
        _ampere("a100", "NVIDIA A100-SXM4-80GB", 108, l2_mib=40, dram_gbps=2039, watts=400),
        _ampere("a100-40gb", "NVIDIA A100-SXM4-40GB", 108, l2_mib=40, dram_gbps=1555, watts=400),
        _small("a10", "NVIDIA A10", "sm_86", 72, l2_mib=6, dram_gbps=600, watts=150, flops=1024),
        _small("rtx3090", "NVIDIA GeForce RTX 3090", "sm_86", 82, l2_mib=6, dram_gbps=936, watts=350, flops=512),
        _small("l40s", "NVIDIA L40S", "sm_89", 142, l2_mib=96, dram_gbps=864, watts=350, flops=1024),
        _small("rtx4090", "NVIDIA GeForce RTX 4090", "sm_89", 128, l2_mib=72, dram_gbps=1008, watts=450, flops=512),
        _small("rtx5090", "NVIDIA GeForce RTX 5090", "sm_120", 170, l2_mib=96, dram_gbps=1792, watts=575, flops=512),
    )
}

KERNELS_VARIABLE = "SRELU24_KERNELS"
"""Environment variable: "native" (the default) or "portable", which takes the portable family on every GPU."""
_NATIVE_ARCHS = {(9, 0): "sm_90a"}
"""Compute capabilities with kernels of their own."""
_PORTABLE = ((8, 0), (8, 6), (8, 7), (8, 8), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
"""Compute capabilities that NVRTC 13.0 compiles the portable kernels for."""


def target_by_key(key: str) -> GpuTarget:
    """The known GPU of that key, with the kernel family that ``SRELU24_KERNELS`` asks for.

    Raises:
        Unsupported: no such key.
    """
    if key not in TARGETS:
        raise Unsupported(f"there is no GPU target {key!r}; known are {', '.join(TARGETS)}")
    return _as_asked(TARGETS[key])


def target_for_device(
    name: str,
    compute_capability: tuple[int, int],
    sm_count: int,
    *,
    smem_per_block: int | None = None,
    registers_per_sm: int = GpuTarget.registers_per_sm,
    l2_bytes: int = GpuTarget.l2_bytes,
    dram_gbps: int | None = None,
    watts: int | None = None,
    clock_mhz: int | None = None,
) -> GpuTarget:
    """The target of a device as its driver describes it, with the native kernel family where it has one.

    A known model keeps its key; any other device (another name, or a part of a known model such as a MIG slice) gets a
    key made from its name and keeps its own limits, so that records never mix. What no driver says, the tensor cores'
    rate, is that of the first known model of the same architecture.

    Args:
        smem_per_block, dram_gbps, watts, clock_mhz: None where the driver does not say, takes that of a known GPU of
        the
            same architecture; where there is none, the least shared memory that any has.

    Raises:
        Unsupported: no kernel family runs on its compute capability.
    """
    arch = arch_of(name, compute_capability)
    for target in TARGETS.values():
        if name == target.name and sm_count == target.sm_count and arch == target.arch:
            return _as_asked(target)
    key = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "", 1)).strip("-") or "gpu"
    if key in TARGETS or name in {t.name for t in TARGETS.values()}:
        key = f"{key}-{sm_count}sm"
    like = next((t for t in TARGETS.values() if t.arch == arch), TARGETS["l40s"])
    found = dataclasses.replace(
        like,
        key=key,
        name=name,
        arch=arch,
        sm_count=sm_count,
        smem_per_block=smem_per_block or like.smem_per_block,
        registers_per_sm=registers_per_sm,
        l2_bytes=l2_bytes,
        dram_gbps=dram_gbps or like.dram_gbps,
        watts=watts or like.watts,
        clock_mhz=clock_mhz or like.clock_mhz,
    )
    return _as_asked(found)


def arch_of(name: str, compute_capability: tuple[int, int]) -> str:
    """What kernels are compiled for on a device: the native family, else the portable one. A capability that NVRTC does
    not know runs the binaries of the nearest lower one of its generation.

    Raises:
        Unsupported: neither family runs on it.
    """
    if compute_capability in _NATIVE_ARCHS:
        return _NATIVE_ARCHS[compute_capability]
    major, minor = compute_capability
    able = [known for known in _PORTABLE if known[0] == major and known[1] <= minor]
    if not able:
        reason = "8.0 (Ampere) or later" if major < _PORTABLE[0][0] else f"at most {_PORTABLE[-1][0]}.x"
        raise Unsupported(f"{name} has compute capability {major}.{minor}; the kernels need {reason}")
    return "sm_{}{}".format(*able[-1])


def _as_asked(target: GpuTarget) -> GpuTarget:
    asked = os.environ.get(KERNELS_VARIABLE, "native")
    if asked not in ("native", "portable"):
        raise Unsupported(f"{KERNELS_VARIABLE} is {asked!r}; native or portable is needed")
    return target.portable if asked == "portable" else target


CCCL = (3, 0)
"""Version of libcu++ that kernels are compiled with: CUTLASS 4.2 does not compile with 3.2 and later, and 3.1 gives
other machine code. Nothing but kernels uses it, so it shuts out no version of PyTorch."""


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
    cccl = _header_dir("nvidia", "cu13/include", "cccl/cuda/std/cstdint", "nvidia-cuda-cccl==13.0.*")
    major, minor = _nvrtc_version()
    cuda_version = _number(cuda / "cuda.h", "CUDA_VERSION")
    headers = cuda_version // 1000, cuda_version % 1000 // 10
    if headers != (major, minor):
        wheel, wanted = ("runtime", (major, minor)) if major == 13 else ("nvrtc", headers)
        raise ToolchainError(
            f"NVRTC is {major}.{minor} but the CUDA headers are {headers[0]}.{headers[1]}, and both have to be of one"
            f" version; run: pip install 'nvidia-cuda-{wheel}=={wanted[0]}.{wanted[1]}.*'"
        )
    cccl_version = _number(cccl / "cccl" / "cuda" / "std" / "__cccl" / "version.h", "CCCL_VERSION")
    if (found := (cccl_version // 10**6, cccl_version // 1000 % 1000)) != CCCL:
        raise ToolchainError(
            f"libcu++ is of CCCL {found[0]}.{found[1]}, and CUTLASS 4.2 needs {CCCL[0]}.{CCCL[1]};"
            " run: pip install 'nvidia-cuda-cccl==13.0.*'"
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
    text = header.read_text(encoding="utf-8", errors="replace")
    return dict(re.findall(r"^#\s*define\s+(\w+)\s+(\d+)\s*$", text, re.MULTILINE))


def _number(header: Path, macro: str) -> int:
    try:
        return int(_defines(header)[macro])
    except (OSError, KeyError) as error:
        raise ToolchainError(
            f"{header} does not tell {macro}; run: pip install --force-reinstall 'nvidia-cuda-runtime==13.*'"
            " 'nvidia-cuda-cccl==13.0.*'"
        ) from error


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
