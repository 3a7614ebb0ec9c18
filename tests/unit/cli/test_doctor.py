"""The doctor: each check on healthy and on sick machines, which are made up here."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from srelu24.cli import doctor, main
from srelu24.cli.doctor import Check, Driver, Gpu, Status
from srelu24.db import database
from srelu24_gen import target
from srelu24_gen.errors import ToolchainError

H200 = Gpu(0, "NVIDIA H200", (9, 0), 132)
A100 = Gpu(1, "NVIDIA A100-SXM4-80GB", (8, 0), 108)
T4 = Gpu(0, "Tesla T4", (7, 5), 40)


@pytest.fixture(autouse=True)
def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRELU24_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))


class FakeCuda:
    """The part of cuda.bindings.driver that the doctor calls, for a machine with the given devices."""

    class CUresult:
        CUDA_SUCCESS = SimpleNamespace(name="CUDA_SUCCESS")

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="sm_count",
    )

    def __init__(self, *gpus: Gpu, version: int = 13000, init: str = "CUDA_SUCCESS") -> None:
        self.gpus, self.version, self.init = gpus, version, init

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return self.CUresult.CUDA_SUCCESS, self.version

    def cuInit(self, flags: int) -> tuple[Any]:
        ok = self.init == "CUDA_SUCCESS"
        return (self.CUresult.CUDA_SUCCESS if ok else SimpleNamespace(name=self.init),)

    def cuDeviceGetCount(self) -> tuple[Any, int]:
        return self.CUresult.CUDA_SUCCESS, len(self.gpus)

    def cuDeviceGet(self, index: int) -> tuple[Any, Gpu]:
        return self.CUresult.CUDA_SUCCESS, self.gpus[index]

    def cuDeviceGetName(self, length: int, gpu: Gpu) -> tuple[Any, bytes]:
        return self.CUresult.CUDA_SUCCESS, gpu.name.encode() + b"\0\0"

    def cuDeviceGetAttribute(self, which: str, gpu: Gpu) -> tuple[Any, int]:
        major, minor = gpu.compute_capability
        return self.CUresult.CUDA_SUCCESS, {"major": major, "minor": minor, "sm_count": gpu.sm_count}[which]


# --- driver and GPU -------------------------------------------------------------------------------------------------


def test_driver_lists_its_devices() -> None:
    assert doctor._devices(FakeCuda(H200, A100, version=13010)) == Driver(True, 13010, (H200, A100))


def test_driver_that_does_not_start_keeps_its_version_and_reason() -> None:
    driver = doctor._devices(FakeCuda(version=12080, init="CUDA_ERROR_NO_DEVICE"))
    assert (driver.present, driver.cuda_version, driver.gpus) == (True, 12080, ())
    assert "CUDA_ERROR_NO_DEVICE" in driver.problem


@pytest.mark.parametrize(
    ("driver", "status", "words"),
    [
        (Driver(present=False, problem="no libcuda.so.1"), Status.WARN, "no libcuda.so.1"),
        (Driver(True, 13000, (H200,)), Status.OK, "CUDA 13.0"),
        (Driver(True, 13020, (H200,)), Status.OK, "CUDA 13.2"),
        (Driver(True, 12080, (H200,)), Status.FAIL, "CUDA 12.8"),
        (Driver(True, 13000, problem="the CUDA driver answered CUDA_ERROR_NO_DEVICE"), Status.WARN, "NO_DEVICE"),
        (Driver(True, 13000, problem="the CUDA driver answered CUDA_ERROR_UNKNOWN"), Status.FAIL, "UNKNOWN"),
    ],
)
def test_driver_check(driver: Driver, status: Status, words: str) -> None:
    check = doctor.check_driver(driver)
    assert check.status is status
    assert words in check.found
    assert bool(check.mend) == (status is not Status.OK)


def test_gpu_check_wants_ampere_or_later() -> None:
    assert doctor.check_gpus((T4, H200)).status is Status.OK
    assert doctor.check_gpus((A100,)).status is Status.OK
    assert doctor.check_gpus((T4,)).status is Status.WARN
    assert "8.0 or later" in doctor.check_gpus((T4,)).found
    assert doctor.check_gpus(()).status is Status.WARN


def test_this_gpu_is_the_first_that_kernels_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe_driver", lambda: Driver(True, 13000, (T4, H200, A100)))
    found = doctor.this_gpu()
    assert found is not None
    assert found.key == "h200"
    monkeypatch.setattr(doctor, "probe_driver", lambda: Driver(True, 13000, (T4,)))
    assert doctor.this_gpu() is None


# --- software -------------------------------------------------------------------------------------------------------


def test_python_check() -> None:
    assert doctor.check_python().status is Status.OK
    assert doctor.check_python((3, 10, 14)).status is Status.FAIL
    assert doctor.check_python((3, 11, 0)).status is Status.OK


@pytest.mark.parametrize(
    ("version", "cuda", "sees_gpu", "has_gpu", "status"),
    [
        ("2.13.0+cpu", None, False, False, Status.OK),
        ("2.13.0+cu130", "13.0", True, True, Status.OK),
        ("2.9.1", "13.0", True, True, Status.FAIL),
        ("2.13.0+cpu", None, False, True, Status.FAIL),
        ("2.13.0", "13.0", False, True, Status.FAIL),
        ("2.13.0", "13.0", False, False, Status.OK),
        ("3.0.0a1", "13.0", True, True, Status.OK),
    ],
)
def test_torch_check(
    version: str, cuda: str | None, sees_gpu: bool, has_gpu: bool, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    check = doctor.check_torch(has_gpu)
    assert check.status is status
    assert version in check.found


def test_toolchain_check_tells_versions_and_folders() -> None:
    checks = {check.name: check for check in doctor.check_toolchain()}
    toolchain = target.Toolchain.find()
    assert toolchain.nvrtc_version in checks["NVRTC"].found
    assert toolchain.cutlass_version in checks["CUTLASS headers"].found
    folder = checks["CUDA headers"].found
    assert (Path(folder) / "cuda_fp16.h").is_file()
    assert (Path(checks["CUTLASS headers"].found.split(", ")[-1]) / "cutlass/cutlass.h").is_file()


def test_missing_toolchain_is_a_failure_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ToolchainError("the header cute/x.hpp was not found; run: pip install 'nvidia-cutlass==4.*'")

    monkeypatch.setattr(target.Toolchain, "find", missing)
    (check,) = doctor.check_toolchain()
    assert check.status is Status.FAIL
    assert check.found == "the header cute/x.hpp was not found"
    assert check.mend == "pip install 'nvidia-cutlass==4.*'"


# --- folders --------------------------------------------------------------------------------------------------------


def test_cache_may_exist_or_not(tmp_path: Path) -> None:
    assert doctor.check_cache(tmp_path).status is Status.OK
    assert doctor.check_cache(tmp_path / "not" / "yet").status is Status.OK
    assert not (tmp_path / "not").exists()


def test_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    (check,) = doctor._guarded("cache folder", lambda: doctor.check_cache(tmp_path))
    assert check.status is Status.FAIL
    assert "chmod go-w" in check.mend


def test_file_in_place_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.check_cache(tmp_path / "file" / "cache").status is Status.FAIL


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = doctor.check_cache(tmp_path)
    assert check.status is Status.WARN
    assert "SRELU24_CACHE_DIR" in check.mend


def test_cache_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(10, 10, 5 << 20))
    check = doctor.check_cache(tmp_path)
    assert check.status is Status.WARN
    assert "5 MiB" in check.found


def test_damaged_store_is_a_warning(tmp_path: Path) -> None:
    assert doctor.check_database().status is Status.OK
    store = database.Database.open().user_file
    store.parent.mkdir()
    store.write_bytes(b"not a database at all" * 100)
    check = doctor.check_database()
    assert check.status is Status.WARN
    assert "damaged" in check.found


# --- the whole ------------------------------------------------------------------------------------------------------


def test_a_check_that_breaks_becomes_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "check_database", broken)
    last = doctor.diagnose()[-1]
    assert (last.name, last.status) == ("tuning database", Status.FAIL)
    assert "ZeroDivisionError: oh" in last.found


@pytest.mark.parametrize(("status", "code"), [(Status.OK, 0), (Status.WARN, 0), (Status.FAIL, 1)])
def test_command_exits_with_1_only_on_failure(status: Status, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("Python", Status.OK, "3.11"), Check("a check", status, "found [this]", "do that")]
    monkeypatch.setattr(doctor, "diagnose", lambda: checks)
    result = CliRunner().invoke(main.app, ["doctor", "--json"])
    assert result.exit_code == code
    assert json.loads(result.stdout)[1] == {
        "name": "a check",
        "status": status.value,
        "found": "found [this]",
        "mend": "do that",
    }
    table = CliRunner().invoke(main.app, ["doctor"])
    assert table.exit_code == code
    assert "found [this]" in table.stdout
