"""Power, clocks and energy of one GPU through NVML; None where NVML or a reading is missing."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

import pynvml
import torch

COUNTER_SECONDS = 0.2
"""The energy counter moves in steps of up to about 0.1 s; over shorter windows it says nothing."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the GPU; a field is None where the driver does not give it."""

    seconds: float
    """Host time, of the clock that the :class:`Sampler` was given."""
    watts: float | None
    sm_mhz: float | None
    joules: float | None
    """The driver's energy counter; only differences mean anything."""
    throttled: bool | None
    """Slowed by heat, by a power brake or by a hardware fault: times taken now are not the GPU's own."""
    power_capped: bool | None
    """Slowed by the power limit, which is how large GEMMs always run on this kind of GPU."""


@dataclass(frozen=True, slots=True)
class Power:
    """What the readings in some windows of time say together."""

    watts: float | None = None
    sm_mhz: float | None = None
    throttled: bool = False
    power_capped: bool = False
    from_counter: bool = False
    """``watts`` is energy over time by the driver's counter, rather than the mean of power readings."""


class Gpu:
    """NVML's view of one GPU. Every reading is None where the driver does not give it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def open(cls, device: torch.device | str) -> Self | None:
        """The NVML handle of a torch device, or None: not a CUDA device, or NVML does not know it."""
        device = torch.device(device)
        if device.type != "cuda" or not torch.cuda.is_available():
            return None
        try:
            pynvml.nvmlInit()
            # By UUID: NVML's indices know nothing of CUDA_VISIBLE_DEVICES.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            return cls(pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def driver(self) -> str | None:
        """Version of the NVIDIA driver."""
        version: str | None = _call_nvml(pynvml.nvmlSystemGetDriverVersion)
        return version

    def power_limit_watts(self) -> float | None:
        """The limit that is in force now."""
        milliwatts = _call_nvml(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle)
        return None if milliwatts is None else milliwatts / 1000

    def watts(self) -> float | None:
        """Power now, not NVML's usual one-second average, where the driver gives it."""
        fields = _call_nvml(pynvml.nvmlDeviceGetFieldValues, self._handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
        if fields and fields[0].nvmlReturn == 0:
            return float(fields[0].value.uiVal) / 1000
        milliwatts = _call_nvml(pynvml.nvmlDeviceGetPowerUsage, self._handle)
        return None if milliwatts is None else milliwatts / 1000

    def read(self, seconds: float) -> Reading:
        """Everything at once, stamped with ``seconds``."""
        millijoules = _call_nvml(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        reasons = _call_nvml(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle)
        slowed = (
            pynvml.nvmlClocksEventReasonSwThermalSlowdown
            | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
            | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        return Reading(
            seconds=seconds,
            watts=self.watts(),
            sm_mhz=_call_nvml(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_SM),
            joules=None if millijoules is None else millijoules / 1000,
            throttled=None if reasons is None else bool(reasons & slowed),
            power_capped=None if reasons is None else bool(reasons & pynvml.nvmlClocksEventReasonSwPowerCap),
        )


class Sampler:
    """Reads a GPU every 10 ms on a thread of its own while the context is open; without a GPU it has no readings."""

    def __init__(
        self, gpu: Gpu | None, *, interval: float = 0.01, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.readings: list[Reading] = []
        self._gpu = gpu
        self._interval = interval
        self._now = now
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._gpu is not None:
            self._thread = threading.Thread(
                target=self._read_until_stopped, args=(self._gpu,), name="srelu24-nvml", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def over(self, windows: Iterable[tuple[float, float]]) -> Power:
        """What was read within windows (start, end) of host time. Few and short windows may hold nothing."""
        inside: list[Reading] = []
        counted: list[float] = []
        for start, end in windows:
            # A reading speaks of the time before it.
            readings = [r for r in list(self.readings) if start < r.seconds <= end]
            inside += readings
            counted += _counter_watts(readings)
        watts = counted or [r.watts for r in inside if r.watts is not None]
        clocks = [r.sm_mhz for r in inside if r.sm_mhz is not None]
        return Power(
            watts=fmean(watts) if watts else None,
            sm_mhz=fmean(clocks) if clocks else None,
            throttled=any(r.throttled for r in inside),
            power_capped=any(r.power_capped for r in inside),
            from_counter=bool(counted),
        )

    def _read_until_stopped(self, gpu: Gpu) -> None:
        while not self._stop.wait(self._interval):
            self.readings.append(gpu.read(self._now()))


def _call_nvml(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except pynvml.NVMLError:
        return None


def _counter_watts(readings: list[Reading]) -> list[float]:
    """Energy over time between the first and the last step of the counter, if they lie far enough apart."""
    steps = [
        (after.seconds, after.joules)
        for before, after in itertools.pairwise(readings)
        if before.joules is not None and after.joules is not None and after.joules != before.joules
    ]
    if len(steps) < 2 or steps[-1][0] - steps[0][0] < COUNTER_SECONDS:
        return []
    (first, joules), (last, end_joules) = steps[0], steps[-1]
    return [(end_joules - joules) / (last - first)]
