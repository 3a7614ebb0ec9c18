"""What the driver says of a GPU, as far as the cost model asks for it."""

from __future__ import annotations

import torch
from cuda.bindings import driver

_ATTRIBUTE = driver.CUdevice_attribute


def dram_gbps(device: torch.device) -> int | None:
    """Peak memory bandwidth in GB/s: two transfers a clock over the whole bus. None where the driver does not say."""
    khz = _attribute(device, _ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)
    bits = _attribute(device, _ATTRIBUTE.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)
    return None if khz is None or bits is None else round(2 * khz * 1e3 * bits / 8 / 1e9)


def clock_mhz(device: torch.device) -> int | None:
    """The highest clock of a multiprocessor. None where the driver does not say."""
    khz = _attribute(device, _ATTRIBUTE.CU_DEVICE_ATTRIBUTE_CLOCK_RATE)
    return None if khz is None else round(khz / 1000)


def watts(device: torch.device) -> int | None:
    """The power limit that the GPU is sold with. None where NVML does not say."""
    import pynvml  # here: a GPU that is listed is never asked

    try:
        pynvml.nvmlInit()
        # By UUID: NVML's indices know nothing of CUDA_VISIBLE_DEVICES.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        milliwatts: int = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)
        return round(milliwatts / 1000)
    except pynvml.NVMLError:
        return None


def _attribute(device: torch.device, which: driver.CUdevice_attribute) -> int | None:
    """A positive answer of ``cuDeviceGetAttribute``, else None."""
    status, value = driver.cuDeviceGetAttribute(which, device.index or 0)
    return int(value) if status == driver.CUresult.CUDA_SUCCESS and value > 0 else None
