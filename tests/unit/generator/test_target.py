"""GPU targets by key and by device; what Toolchain.find says when a part is missing."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from srelu24_gen import cost, space, target
from srelu24_gen.errors import ToolchainError, Unsupported
from srelu24_gen.spec import DType, Family, KernelConfig, Op, Problem
from srelu24_gen.target import TARGETS, Toolchain, target_by_key, target_for_device

SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_120": 100}
"""Of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""
CORES = {  # of NVIDIA's data sheets and architecture white papers, with those of a multiprocessor
    "h100": (16896, 128),
    "h200": (16896, 128),
    "h100-pcie": (14592, 128),
    "a100": (6912, 64),
    "a10": (9216, 128),
    "rtx3090": (10496, 128),
    "l40s": (18176, 128),
    "rtx4090": (16384, 128),
    "rtx5090": (21760, 128),
}


def test_limits_follow_from_the_multiprocessor() -> None:
    for key, gpu in TARGETS.items():
        assert gpu.key == key
        assert gpu.smem_per_block == (SHARED_KIB[gpu.arch] - 1) * 1024, "all but 1 KiB, which is the system's"
        assert gpu.registers_per_sm * 4 == 256 * 1024, "a 256 KiB register file"
        assert gpu.l2_bytes % (1 << 20) == 0
    for key, (cores, per_multiprocessor) in CORES.items():
        assert target_by_key(key).sm_count == cores // per_multiprocessor


def test_an_unknown_key_names_the_known_ones() -> None:
    with pytest.raises(Unsupported, match=r"'b200'.*h100, .*h200"):
        target_by_key("b200")


@pytest.mark.parametrize(
    ("name", "sms", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "h100"),
        ("NVIDIA H100 PCIe", 114, "h100-pcie"),
        ("NVIDIA H100 NVL", 132, "h100-nvl"),
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA GH200 480GB", 132, "gh200"),
        ("NVIDIA GH200 144G HBM3e", 132, "gh200-144gb"),
        ("NVIDIA H200 NVL", 132, "h200-nvl"),
        ("NVIDIA H800", 132, "h800"),
        ("NVIDIA H20", 78, "h20"),
        ("NVIDIA H200 MIG 1g.18gb", 16, "h200-mig-1g-18gb"),
        ("NVIDIA GH200 480GB MIG 1g.12gb", 16, "gh200-480gb-mig-1g-12gb"),
    ],
)
def test_devices_are_told_apart(name: str, sms: int, key: str) -> None:
    found = target_for_device(name, (9, 0), sms)
    assert (found.key, found.name, found.sm_count) == (key, name, sms)
    assert re.fullmatch(r"[a-z0-9-]+", found.key), "a key is a folder name"


def test_every_known_device_is_found_by_its_own_description() -> None:
    capability = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_120": (12, 0)}
    for gpu in TARGETS.values():
        assert target_for_device(gpu.name, capability[gpu.arch], gpu.sm_count) == gpu


def test_part_of_a_known_gpu_is_another_target_with_its_own_limits() -> None:
    found = target_for_device("NVIDIA H200", (9, 0), 60, smem_per_block=1000, registers_per_sm=2000, l2_bytes=3000)
    assert found.key not in TARGETS
    assert (found.sm_count, found.smem_per_block, found.registers_per_sm, found.l2_bytes) == (60, 1000, 2000, 3000)


def test_an_unlisted_gpu_is_what_its_driver_says() -> None:
    """What the driver does not say is that of a listed one of its architecture, never more than one guess."""
    found = target_for_device("NVIDIA H900", (9, 0), 100, dram_gbps=6000, watts=450, clock_mhz=1600)
    assert (found.key, found.sm_count, found.dram_gbps, found.watts, found.clock_mhz) == ("h900", 100, 6000, 450, 1600)
    assert found.dense_flops_per_clock == TARGETS["h100"].dense_flops_per_clock
    silent = target_for_device("NVIDIA H900", (9, 0), 100)
    assert (silent.dram_gbps, silent.watts) == (TARGETS["h100"].dram_gbps, TARGETS["h100"].watts)


def test_predictions_follow_the_gpu() -> None:
    """An H20 has a quarter of an H100's tensor rate on 78 of its 132 multiprocessors."""
    problem = Problem(Family(Op.GEMM, DType.BF16), 16384, 8192, 8192)
    us = {key: cost.cost(problem, space.default(problem, TARGETS[key]), TARGETS[key]).us for key in ("h20", "h100")}
    flops = 2 * 16384 * 8192 * 8192
    assert us["h20"] > 1e6 * flops / 148e12, "above what its data sheet allows"
    assert us["h20"] / us["h100"] > 3
    slow = dataclasses.replace(TARGETS["h200"], clock_mhz=990)
    assert cost.cost(problem, KernelConfig(), slow).us > 1.5 * cost.cost(problem, KernelConfig(), TARGETS["h200"]).us


@pytest.mark.parametrize(
    ("capability", "arch", "kernels"),
    [
        ((9, 0), "sm_90a", "native kernels (wgmma)"),
        ((8, 0), "sm_80", "portable kernels (mma.sync)"),
        ((8, 6), "sm_86", "portable kernels (mma.sync)"),
        ((8, 9), "sm_89", "portable kernels (mma.sync)"),
        ((10, 0), "sm_100", "portable kernels (mma.sync)"),
        ((10, 1), "sm_100", "portable kernels (mma.sync)"),  # binaries run on later minor versions
        ((12, 0), "sm_120", "portable kernels (mma.sync)"),
    ],
)
def test_the_kernel_family_follows_from_the_compute_capability(
    capability: tuple[int, int], arch: str, kernels: str
) -> None:
    found = target_for_device("Some GPU", capability, 99, smem_per_block=101376)
    assert (found.arch, found.kernels, found.sm_count, found.smem_per_block) == (arch, kernels, 99, 101376)
    assert found.key == "some-gpu"


@pytest.mark.parametrize(
    ("capability", "words"),
    [((7, 5), r"7\.5; the kernels need 8\.0"), ((13, 0), r"13\.0; the kernels need at most")],
)
def test_what_no_family_runs_on_is_refused_with_the_reason(capability: tuple[int, int], words: str) -> None:
    with pytest.raises(Unsupported, match=f"Some GPU has compute capability {words}"):
        target_for_device("Some GPU", capability, 108)


def test_the_portable_family_on_hopper_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target_by_key("h200").arch == "sm_90a"
    monkeypatch.setenv("SRELU24_KERNELS", "portable")
    assert target_by_key("h200") == TARGETS["h200"].portable
    assert target_for_device("NVIDIA H200", (9, 0), 132).kernels == "portable kernels (mma.sync)"
    assert target_by_key("a100") == TARGETS["a100"]
    monkeypatch.setenv("SRELU24_KERNELS", "best")
    with pytest.raises(Unsupported, match="SRELU24_KERNELS is 'best'; native or portable is needed"):
        target_by_key("h200")


# ---- toolchain


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A complete environment of empty headers, and an NVRTC 13.0 that answers its version."""
    headers = {
        "cutlass_library/source/include/cute/arch/mma_sm90_gmma_sparse.hpp": "",
        "cutlass_library/source/include/cutlass/version.h": (
            "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1 \n"
        ),
        "nvidia/cu13/include/cuda_fp16.h": "",
        "nvidia/cu13/include/cuda.h": "#define CUDA_VERSION 13000\n",
        "nvidia/cu13/include/crt/host_defines.h": "",
        "nvidia/cu13/include/cccl/cuda/std/cstdint": "",
        "nvidia/cu13/include/cccl/cuda/std/__cccl/version.h": "#define CCCL_VERSION 3000001\n",
    }
    for name, text in headers.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(target, "_package_dirs", lambda package: iter([tmp_path / "elsewhere", tmp_path / package]))
    monkeypatch.setattr(target, "_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(target, "_patch_version", lambda major, minor: f"{major}.{minor}.99")
    target._find_parts.cache_clear()
    yield tmp_path
    target._find_parts.cache_clear()


def test_a_complete_environment_is_found(environment: Path) -> None:
    found = Toolchain.find()
    assert found.nvrtc_version == "13.0.99"
    assert found.cutlass_version == "4.2.1"
    cuda = environment / "nvidia/cu13/include"
    assert found.include_dirs == (environment / "cutlass_library/source/include", cuda, cuda / "cccl")


def test_headers_spread_over_the_import_path_are_all_found(environment: Path) -> None:
    elsewhere = environment / "elsewhere/cu13/include"
    elsewhere.mkdir(parents=True)
    (environment / "nvidia/cu13/include/cccl").rename(elsewhere / "cccl")
    cuda = environment / "nvidia/cu13/include"
    assert Toolchain.find().include_dirs[1:] == (cuda, elsewhere, elsewhere / "cccl")


@pytest.mark.parametrize(
    ("header", "wheel"),
    [
        ("cutlass_library/source/include/cute/arch/mma_sm90_gmma_sparse.hpp", "nvidia-cutlass"),
        ("nvidia/cu13/include/cuda_fp16.h", "nvidia-cuda-runtime"),
        ("nvidia/cu13/include/crt/host_defines.h", "nvidia-cuda-crt"),
        ("nvidia/cu13/include/cccl/cuda/std/cstdint", "nvidia-cuda-cccl"),
    ],
)
def test_a_missing_header_names_the_wheel_and_is_looked_for_again(environment: Path, header: str, wheel: str) -> None:
    (environment / header).unlink()
    with pytest.raises(ToolchainError, match=rf"pip install '{wheel}=="):
        Toolchain.find()
    (environment / header).touch()
    assert Toolchain.find().include_dirs


@pytest.mark.parametrize(
    ("nvrtc", "cuda", "words"),
    [
        (
            (12, 8),
            13000,
            r"NVRTC is 12\.8 but the CUDA headers are 13\.0.*pip install 'nvidia-cuda-nvrtc==13\.0\.\*'",
        ),
        (
            (13, 2),
            13000,
            r"NVRTC is 13\.2 but the CUDA headers are 13\.0.*pip install 'nvidia-cuda-runtime==13\.2",
        ),
        (
            (13, 0),
            13050,
            r"NVRTC is 13\.0 but the CUDA headers are 13\.5.*pip install 'nvidia-cuda-runtime==13\.0",
        ),
    ],
)
def test_nvrtc_of_another_cuda_is_refused(
    nvrtc: tuple[int, int], cuda: int, words: str, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_nvrtc_version", lambda: nvrtc)
    (environment / "nvidia/cu13/include/cuda.h").write_text(f"#define CUDA_VERSION {cuda}\n")
    with pytest.raises(ToolchainError, match=words):
        Toolchain.find()


def test_a_newer_cuda_13_is_taken_where_nvrtc_and_headers_agree(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_nvrtc_version", lambda: (13, 5))
    (environment / "nvidia/cu13/include/cuda.h").write_text("#define CUDA_VERSION 13050\n")
    assert Toolchain.find().nvrtc_version == "13.5.99"


def test_a_libcu_that_cutlass_does_not_compile_with_is_refused(environment: Path) -> None:
    version = environment / "nvidia/cu13/include/cccl/cuda/std/__cccl/version.h"
    version.write_text("#define CCCL_VERSION 3002000\n")
    with pytest.raises(ToolchainError, match=r"CCCL 3\.2, and CUTLASS 4\.2 needs 3\.0.*'nvidia-cuda-cccl"):
        Toolchain.find()
    version.unlink()
    with pytest.raises(ToolchainError, match="does not tell CCCL_VERSION"):
        Toolchain.find()


def test_missing_bindings_and_missing_library_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"')  # what cuda-pathfinder raises

    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=SimpleNamespace(nvrtcVersion=no_library)))
    with pytest.raises(ToolchainError, match="pip install 'nvidia-cuda-nvrtc==13"):
        target._nvrtc_version()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ToolchainError, match="pip install 'cuda-bindings==13"):
        target._nvrtc_version()


def test_the_wheels_patch_level_counts_only_if_it_is_that_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "13.0.88")
    assert target._patch_version(13, 0) == "13.0.88"
    assert target._patch_version(13, 1) == "13.1"
