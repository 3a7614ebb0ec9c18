"""Cubin to kernel through cuda-python, and the launch itself."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver

from srelu24_gen.compile import BuiltKernel
from srelu24_gen.errors import LaunchError


def check(result: tuple[Any, ...], doing: str) -> Any:
    """Unwrap a cuda.bindings result.

    Raises:
        LaunchError: the driver answered with an error; the message says what was being done.
    """
    status = result[0]
    if status != driver.CUresult.CUDA_SUCCESS:
        name = getattr(status, "name", str(status))
        raise LaunchError(f"{doing} failed with {name}.")
    return result[1] if len(result) > 1 else None


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel the driver holds, ready on one device."""

    name: str
    function: driver.CUfunction
    library: driver.CUlibrary
    shared_bytes: int
    threads: int
    device: int
    sm_count: int
    """Multiprocessors of the device."""

    def launch(self, grid: int, arguments: int, stream: int) -> None:
        """Launch ``grid`` CTAs on ``stream`` (raw handle) without synchronising.

        Args:
            arguments: address of the array of pointers to the kernel's arguments; the driver copies them.

        Raises:
            LaunchError: the driver refused.
        """
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                self.launch(grid, arguments, stream)
            return
        make_context_current()
        status = driver.cuLaunchKernel(
            self.function, grid, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, arguments, 0
        )[0]
        if status != driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"launching {self.name} on cuda:{self.device} failed with {status.name}.")


def load(built: BuiltKernel, device: int, *, threads: int, shared_bytes: int) -> LoadedKernel:
    """Load a cubin on ``cuda:device``.

    Raises:
        LaunchError: the driver refuses the cubin, for example one for another architecture.
    """
    name = built.spec.name
    make_context_current()
    library = check(
        driver.cuLibraryLoadData(built.cubin, [], [], 0, [], [], 0),
        f"loading the cubin of {name} on {torch.cuda.get_device_name(device)}",
    )
    kernel = check(driver.cuLibraryGetKernel(library, built.meta.entry.encode()), f"finding the kernel in {name}")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(
        driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device)),
        f"giving {name} {shared_bytes} bytes of shared memory",
    )
    return LoadedKernel(
        name=name,
        function=driver.CUfunction(int(kernel)),
        library=library,
        shared_bytes=shared_bytes,
        threads=threads,
        device=device,
        sm_count=torch.cuda.get_device_properties(device).multi_processor_count,
    )


_thread = threading.local()


def make_context_current() -> None:
    """Make a device's primary context current in this thread, which launches and tensor maps need. torch does so, and
    is asked once a thread."""
    if not getattr(_thread, "bound", False):
        torch.cuda.set_device(torch.cuda.current_device())
        _thread.bound = True


def stream(device: int) -> int:
    """The handle of a device's current stream. torch's public function builds an object first, which takes 3 us."""
    return torch._C._cuda_getCurrentRawStream(device)


class ArgumentBlock:
    """One by-value kernel argument, 64-byte aligned as tensor maps need, and the pointer array to it."""

    __slots__ = ("_memory", "_pointers", "address")

    def __init__(self, content: bytes) -> None:
        # 64 bytes more to align the start, and 64 because the driver reads a struct with its padding.
        self._memory = ctypes.create_string_buffer(len(content) + 128)
        start = (ctypes.addressof(self._memory) + 63) & ~63
        ctypes.memmove(start, content, len(content))
        self._pointers = (ctypes.c_void_p * 1)(start)
        self.address = ctypes.addressof(self._pointers)


_CACHED_BLOCKS = 4096
"""Parameter blocks that a kernel keeps; torch's allocator reuses addresses, so few are needed."""


def keep_block(blocks: dict[tuple[Any, ...], Any], key: tuple[Any, ...], block: object) -> None:
    """Keep what was encoded for some arguments; what was kept before is dropped where it has become too much."""
    if len(blocks) >= _CACHED_BLOCKS:
        blocks.clear()
    blocks[key] = block
