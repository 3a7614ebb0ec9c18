"""What this machine has, what is wrong with it, and how to mend it.

Each check answers a :class:`Check` and never raises.
No GPU is a warning: kernels can be built and the CPU reference runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from srelu24_gen import paths, target
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.store import BuildStore

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 10)
MIN_DRIVER_CUDA = 13000
"""CUDA version a driver must know to load NVRTC 13's cubins, as the driver API counts: 1000 major + 10 minor."""
MIN_FREE_BYTES = 1 << 30


class Status(StrEnum):
    """How a check ended; only FAIL makes `srelu24 doctor` exit with 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    found: str
    mend: str = ""
    """What to do; empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device as the driver describes it."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    sm_count: int

    @property
    def supported(self) -> bool:
        """Whether kernels of this project run on it."""
        try:
            target.arch_of(self.name, self.compute_capability)
        except Unsupported:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Driver:
    """The CUDA driver: the CUDA version it knows (0 where it is not known), its devices, and what is wrong with it."""

    present: bool
    cuda_version: int = 0
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


def probe_driver() -> Driver:
    """Asks the CUDA driver for its version and devices. Never raises; creates no context on a device."""
    try:
        from cuda.bindings import driver as cuda
    except ImportError as error:
        return Driver(present=False, problem=f"cuda-bindings cannot be imported ({error})")
    try:
        return _devices(cuda)
    except RuntimeError as error:  # cuda-bindings raises it when libcuda.so.1 is not there
        return Driver(present=False, problem=str(error))


def _devices(cuda: Any) -> Driver:
    def value(result: tuple[Any, ...]) -> Any:
        if result[0] != cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver answered {getattr(result[0], 'name', result[0])}")
        return result[1] if len(result) > 1 else None

    version = int(value(cuda.cuDriverGetVersion()))
    try:
        value(cuda.cuInit(0))
        attribute = cuda.CUdevice_attribute
        gpus = []
        for index in range(value(cuda.cuDeviceGetCount())):
            device = value(cuda.cuDeviceGet(index))
            name = value(cuda.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
            major, minor, sm_count = (
                int(value(cuda.cuDeviceGetAttribute(which, device)))
                for which in (
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                    attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                )
            )
            gpus.append(Gpu(index, name, (major, minor), sm_count))
    except RuntimeError as error:
        return Driver(present=True, cuda_version=version, problem=str(error))
    return Driver(present=True, cuda_version=version, gpus=tuple(gpus))


def this_gpu() -> target.GpuTarget | None:
    """The first GPU of this machine that kernels run on, as a build target, or None."""
    for gpu in probe_driver().gpus:
        if gpu.supported:
            return target.target_for_device(gpu.name, gpu.compute_capability, gpu.sm_count)
    return None


def diagnose() -> list[Check]:
    """Runs every check, in the order in which they are worth mending."""
    driver = probe_driver()
    return [
        *_guarded("Python", check_python),
        *_guarded("PyTorch", lambda: check_torch(has_gpu=any(gpu.supported for gpu in driver.gpus))),
        *_guarded("driver", lambda: check_driver(driver)),
        *_guarded("GPU", lambda: check_gpus(driver.gpus)),
        *_guarded("toolchain", check_toolchain),
        *_guarded("cache folder", lambda: check_cache(paths.cache_dir())),
        *_guarded("tuning database", check_database),
    ]


def healthy(checks: Iterable[Check]) -> bool:
    """Whether no check failed; warnings are allowed."""
    return all(check.status is not Status.FAIL for check in checks)


def _guarded(name: str, check: Callable[[], Check | list[Check]]) -> list[Check]:
    """A doctor that crashes on a sick machine is of no use: whatever goes wrong becomes a failed check."""
    try:
        done = check()
    except Srelu24Error as error:
        done = _failed(name, error)
    except Exception as error:
        done = Check(name, Status.FAIL, f"the check itself failed with {type(error).__name__}: {error}")
    return done if isinstance(done, list) else [done]


def _failed(name: str, error: Srelu24Error) -> Check:
    """Our messages end with the command that mends what they report."""
    found, _, mend = str(error).partition("; run: ")
    return Check(name, Status.FAIL, found, mend)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """The interpreter's version."""
    text = ".".join(map(str, version))
    if version < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        return Check("Python", Status.FAIL, f"{text}; {needed} or newer is needed", f"install Python {needed} or newer")
    return Check("Python", Status.OK, f"{text} at {sys.executable}")


def check_torch(has_gpu: bool) -> Check:
    """PyTorch, its version, and whether its build fits the machine. Imports torch."""
    install = f"pip install 'torch>={'.'.join(map(str, MIN_TORCH))}'"
    if importlib.util.find_spec("torch") is None:
        return Check("PyTorch", Status.FAIL, "not installed; kernels can be built, the ops cannot be used", install)
    import torch

    found = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return Check("PyTorch", Status.FAIL, f"{found}; {'.'.join(map(str, MIN_TORCH))} or newer is needed", install)
    if has_gpu and not torch.version.cuda:
        return Check(
            "PyTorch",
            Status.FAIL,
            f"{found}, but this machine has a GPU",
            "install a CUDA build of PyTorch for CUDA 13",
        )
    if has_gpu and not torch.cuda.is_available():
        return Check(
            "PyTorch",
            Status.FAIL,
            f"{found}, which does not see the GPU that the driver lists",
            f"install a build of PyTorch for a CUDA version that the driver knows, and check CUDA_VISIBLE_DEVICES "
            f"({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
        )
    return Check("PyTorch", Status.OK, found)


def check_driver(driver: Driver) -> Check:
    """The NVIDIA driver: there, new enough for CUDA 13 cubins, and working."""
    if not driver.present:
        return Check(
            "driver",
            Status.WARN,
            f"none ({driver.problem}); kernels can be built, not run",
            "to run kernels, install an NVIDIA driver of release 580 or newer",
        )
    version = f"knows CUDA {driver.cuda_version // 1000}.{driver.cuda_version % 1000 // 10}"
    release = _driver_release()
    found = f"{release}, {version}" if release else version
    if driver.cuda_version < MIN_DRIVER_CUDA:
        return Check(
            "driver", Status.FAIL, f"{found}; CUDA 13.0 is needed", "update the NVIDIA driver to release 580 or newer"
        )
    if driver.problem:
        status = Status.WARN if "NO_DEVICE" in driver.problem else Status.FAIL
        return Check("driver", status, f"{found}, but {driver.problem}", "check that nvidia-smi lists the GPU")
    return Check("driver", Status.OK, found)


def _driver_release() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # the release is only for the reader: without NVML the CUDA version of the driver is shown alone
        return ""


def check_gpus(gpus: tuple[Gpu, ...]) -> Check:
    """Whether there is a GPU that the kernels run on."""
    if not gpus:
        return Check("GPU", Status.WARN, "none; kernels can be built for any target, the ops run the CPU reference")
    found = ", ".join(
        f"{gpu.name} (cc {gpu.compute_capability[0]}.{gpu.compute_capability[1]}, {gpu.sm_count} SMs)" for gpu in gpus
    )
    if not any(gpu.supported for gpu in gpus):
        return Check(
            "GPU", Status.WARN, f"{found}; kernels need compute capability 8.0 or later", "use an Ampere or later GPU"
        )
    return Check("GPU", Status.OK, found)


def check_toolchain() -> list[Check]:
    """NVRTC and the headers it compiles against; one failed check where any of them is missing."""
    try:
        toolchain = target.Toolchain.find()
    except Srelu24Error as error:
        return [_failed("toolchain", error)]
    cutlass, cuda, *_ = toolchain.include_dirs
    return [
        Check("NVRTC", Status.OK, toolchain.nvrtc_version),
        Check("CUDA headers", Status.OK, str(cuda)),
        Check("CUTLASS headers", Status.OK, f"{toolchain.cutlass_version}, {cutlass}"),
    ]


def check_cache(folder: Path) -> Check:
    """The folder of compiled kernels: safe to load from, there or creatable, writable, with room."""
    name, other = "cache folder", "or name another folder in SRELU24_CACHE_DIR"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        return Check(name, Status.FAIL, f"{existing} is not a folder", f"move it away, {other}")
    kernels = len(BuildStore(folder).entries())  # refuses a folder that others may write to
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        found = f"{existing} cannot be written ({error.strerror}); every process compiles its own kernels"
        return Check(name, Status.WARN, found, f"make it writable, {other}")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        return Check(name, Status.WARN, f"{folder}, only {free / 2**20:.0f} MiB free", f"free some space, {other}")
    return Check(name, Status.OK, f"{folder}, {kernels} kernels, {free / 2**30:.0f} GiB free")


def check_database() -> Check:
    """The shipped records parse and the user's store opens."""
    from srelu24.db import database

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = len(list(database.Database.open().records()))
    found = f"{count} records; yours are kept in {paths.data_dir()}"
    if caught:
        return Check("tuning database", Status.WARN, f"{found}; {caught[0].message}", "tune again what is missing")
    return Check("tuning database", Status.OK, found)
