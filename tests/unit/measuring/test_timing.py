"""The timing method on a simulated GPU: pairing, medians, drift, power, progress, Ctrl-C."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest
import torch

import srelu24_gen
from srelu24.measuring import machine, nvml, timing
from srelu24.measuring.nvml import Gpu, Power, Reading, Sampler
from srelu24.measuring.timing import Interrupted, Progress, Timing, interleave, ratio


class SimulatedGpu:
    """A clock whose time only passes while a candidate runs, and a sampler that saw every moment of it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.joules = 0.0
        self.sampler = Sampler(None)
        self.ran: list[str] = []

    def candidate(
        self, name: str, ms: Callable[[float], float], watts: float = 500.0, throttled: bool = False
    ) -> Callable[[], None]:
        """A kernel that takes ``ms(now)`` milliseconds."""

        def call() -> None:
            took = ms(self.seconds) / 1000
            self.ran.append(name)
            self.seconds += took
            self.joules += took * watts
            self.sampler.readings.append(Reading(self.seconds, watts, 1500.0, self.joules, throttled, True))

        return call

    def now(self) -> float:
        return self.seconds

    def run(self, call: Callable[[], None], launches: int, lead: int) -> float:
        for _ in range(lead):
            call()
        start = self.seconds
        for _ in range(launches):
            call()
        return (self.seconds - start) * 1000

    def interleave(self, candidates: dict[str, Callable[[], None]], **options: object) -> dict[str, Timing]:
        arguments = {"seconds": 2.0, "min_rounds": 5, **options}
        return interleave(candidates, device="cpu", clock=self, sampler=self.sampler, **arguments)


def test_medians_and_ratio_of_steady_candidates() -> None:
    gpu = SimulatedGpu()
    timings = gpu.interleave({"a": gpu.candidate("a", lambda _: 2.0), "b": gpu.candidate("b", lambda _: 3.0)})
    assert timings["a"].ms == pytest.approx(2.0)
    assert ratio(timings["a"], timings["b"]) == pytest.approx(1.5)
    assert timings["a"].tflops(4e12) == pytest.approx(2000.0)


def test_a_sample_is_about_20_ms_after_a_lead_of_a_quarter() -> None:
    gpu = SimulatedGpu()
    timings = gpu.interleave(
        {"a": gpu.candidate("a", lambda _: 0.5)}, seconds=1.0, on_progress=lambda _: gpu.ran.clear()
    )
    assert len(timings["a"].samples) == pytest.approx(1.0 / 0.025, abs=1)  # 40 launches + 10 in the lead, 25 ms
    gpu.interleave({"a": gpu.candidate("a", lambda _: 50.0)}, seconds=0.0, min_rounds=1)
    assert gpu.ran.count("a") >= 2  # slower than a sample: one lead, one timed


def test_outliers_do_not_move_the_median_or_the_ratio() -> None:
    gpu = SimulatedGpu()

    def spiky(now: float) -> float:
        return 40.0 if int(now * 10) % 5 == 0 else 2.0

    timings = gpu.interleave({"a": gpu.candidate("a", spiky), "b": gpu.candidate("b", lambda _: 3.0)}, seconds=20.0)
    assert max(timings["a"].samples) > 4.0  # the spikes were seen
    assert timings["a"].ms == pytest.approx(2.0, rel=0.01)
    assert ratio(timings["a"], timings["b"]) == pytest.approx(1.5, rel=0.01)


def test_a_gpu_that_slows_down_does_not_move_the_ratio() -> None:
    gpu = SimulatedGpu()

    def slowing(ms: float) -> Callable[[float], float]:
        return lambda now: ms * (1 + now / 10)

    timings = gpu.interleave(
        {"a": gpu.candidate("a", slowing(2.0)), "b": gpu.candidate("b", slowing(3.0))}, seconds=10.0
    )
    assert max(timings["a"].samples) > 1.5 * min(timings["a"].samples)
    assert ratio(timings["a"], timings["b"]) == pytest.approx(1.5, rel=0.02)


def test_every_round_times_every_candidate_once_in_changing_order() -> None:
    gpu = SimulatedGpu()
    names = "abc"
    rounds: list[str] = []

    def on_progress(_: Progress) -> None:
        rounds.append("".join(dict.fromkeys(gpu.ran)))
        gpu.ran.clear()

    timings = gpu.interleave(
        {name: gpu.candidate(name, lambda _: 30.0) for name in names}, seconds=10.0, on_progress=on_progress
    )
    assert all(sorted(order[-3:]) == list(names) for order in rounds)
    assert {order[0] for order in rounds[1:]} == set(names)
    assert {len(t.samples) for t in timings.values()} == {len(rounds)}


@pytest.mark.parametrize("n", range(1, 10))
def test_orders_are_balanced_for_what_a_kernel_leaves_to_the_next(n: int) -> None:
    names = [f"kernel {i}" for i in range(n)]
    rounds = n * (1 + n % 2)
    orders = timing._orders(names, random.Random(n))
    for _ in range(3):  # each design by itself
        design = list(itertools.islice(orders, rounds))
        assert all(sorted(order) == names for order in design)
        places = Counter((name, place) for order in design for place, name in enumerate(order))
        followed = Counter(pair for order in design for pair in itertools.pairwise(order))
        assert set(places.values()) == {rounds // n}
        assert len(followed) == n * (n - 1)
        assert len(set(followed.values())) <= 1


def test_min_rounds_hold_where_time_is_short_and_progress_ends_at_one() -> None:
    gpu = SimulatedGpu()
    seen: list[Progress] = []
    timings = gpu.interleave(
        {"a": gpu.candidate("a", lambda _: 30.0)}, seconds=0.01, min_rounds=7, on_progress=seen.append
    )
    assert len(timings["a"].samples) == 7
    assert [p.rounds for p in seen] == list(range(1, 8))
    assert all(x.fraction < y.fraction for x, y in itertools.pairwise(seen))
    assert seen[-1].fraction == 1.0


def test_the_warm_up_waits_for_a_gpu_that_still_slows_down() -> None:
    gpu = SimulatedGpu()

    def heating(now: float) -> float:
        return 20.0 * (1 + min(now, 2.0))

    timings = gpu.interleave({"a": gpu.candidate("a", heating)}, seconds=6.0)
    assert timings["a"].samples == pytest.approx([60.0] * len(timings["a"].samples))


@pytest.mark.parametrize("stop_at_round", [0, 3])
def test_ctrl_c_keeps_the_finished_rounds(stop_at_round: int) -> None:
    gpu = SimulatedGpu()
    armed = stop_at_round == 0

    def on_progress(progress: Progress) -> None:
        nonlocal armed
        armed = progress.rounds == stop_at_round

    def interrupted() -> None:
        if armed:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        gpu.interleave({"a": gpu.candidate("a", lambda _: 2.0), "b": interrupted}, on_progress=on_progress)
    assert {name: len(t.samples) for name, t in caught.value.timings.items()} == (
        {"a": stop_at_round, "b": stop_at_round} if stop_at_round else {}
    )


def test_power_belongs_to_the_candidate_that_drew_it() -> None:
    gpu = SimulatedGpu()
    timings = gpu.interleave(
        {
            "cool": gpu.candidate("cool", lambda _: 2.0, watts=300.0),
            "hot": gpu.candidate("hot", lambda _: 4.0, watts=700.0, throttled=True),
        }
    )
    cool, hot = timings["cool"], timings["hot"]
    assert cool.watts == pytest.approx(300.0)
    assert hot.watts == pytest.approx(700.0)
    assert hot.joules == pytest.approx(700.0 * 4.0 / 1000)
    assert hot.throttled
    assert not cool.throttled
    assert hot.sm_mhz == 1500.0
    assert not cool.energy_counted
    assert cool.power_capped


def test_energy_comes_from_the_counter_of_a_run_alone() -> None:
    gpu = SimulatedGpu()
    candidates = {
        "a": gpu.candidate("a", lambda _: 2.0, watts=300.0),
        "b": gpu.candidate("b", lambda _: 4.0, watts=700.0),
    }
    timings = gpu.interleave(candidates, energy_seconds=0.5)
    for name, watts, ms in (("a", 300.0, 2.0), ("b", 700.0, 4.0)):
        assert timings[name].energy_counted
        assert timings[name].joules == pytest.approx(watts * ms / 1000, rel=1e-6)


def test_the_counter_is_not_used_over_a_window_too_short_for_it() -> None:
    sampler = Sampler(None)
    # One step of a coarse counter, 0.1 s apart: 5 J / 0.1 s would be 50 W, the readings say 500.
    sampler.readings = [Reading(0.1 * i, 500.0, None, 5.0 * (i // 2), None, None) for i in range(4)]
    assert sampler.over([(0.0, 1.0)]) == Power(watts=500.0)


def test_without_readings_everything_is_none() -> None:
    gpu = SimulatedGpu()
    timings = interleave(
        {"a": gpu.candidate("a", lambda _: 2.0)}, device="cpu", seconds=1.0, clock=gpu, sampler=Sampler(None)
    )
    a = timings["a"]
    assert (a.joules, a.watts, a.sm_mhz, a.throttled) == (None, None, None, False)


def test_no_candidates_and_no_rounds() -> None:
    assert interleave({}, device="cpu", seconds=1.0) == {}
    with pytest.raises(ValueError, match="at least 1 round"):
        interleave({"a": lambda: None}, device="cpu", seconds=1.0, min_rounds=0)


def test_ratio_needs_the_same_run() -> None:
    with pytest.raises(ValueError, match="same run"):
        ratio(Timing.of([1.0]), Timing.of([1.0, 2.0]))


def test_ratio_pairs_the_rounds() -> None:
    # The medians alone would give 2.0 / 2.0.
    assert ratio(Timing.of([1.0, 2.0, 4.0]), Timing.of([2.0, 1.0, 8.0])) == 2.0


def test_the_host_clock_times_a_cpu() -> None:
    timings = interleave({"sleep": lambda: time.sleep(0.004)}, device="cpu", seconds=0.02, min_rounds=3, sample_ms=4.0)
    assert 4.0 <= timings["sleep"].ms < 20.0


def test_capture_without_graphs_says_so_and_gives_the_latest_output() -> None:
    x = torch.ones(3)
    captured = timing.capture(lambda: x * 2, device="cpu")
    x += 1
    captured.call()
    assert captured.output.tolist() == [4.0, 4.0, 4.0]
    assert captured.note is not None
    assert "no CUDA graphs" in captured.note


def test_host_us() -> None:
    assert 1000 <= timing.host_us(lambda: time.sleep(0.001), device="cpu", calls=3, batches=3) < 10_000


def test_environment_is_json_and_says_the_version() -> None:
    env = machine.environment("cpu")
    assert json.loads(json.dumps(env)) == env
    assert env["srelu24"] == srelu24_gen.__version__
    assert env["torch"] == torch.__version__
    assert env["gpu"] is None


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NVML of a GPU at 612.5 W and 1410 MHz, under its power cap."""
    field = SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=612_500))
    fake = SimpleNamespace(
        **{name: value for name, value in vars(pynvml).items() if name.startswith(("NVML", "nvmlClocks"))},
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetEnforcedPowerLimit=lambda _: 700_000,
        nvmlDeviceGetFieldValues=lambda _, ids: [field] if ids == [pynvml.NVML_FI_DEV_POWER_INSTANT] else [],
        nvmlDeviceGetPowerUsage=lambda _: 500_000,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: 12_345,
        nvmlDeviceGetCurrentClocksEventReasons=lambda _: pynvml.nvmlClocksEventReasonSwPowerCap,
        nvmlDeviceGetClockInfo=lambda _, which: 1410 if which == pynvml.NVML_CLOCK_SM else 0,
        field=field,
    )
    monkeypatch.setattr(nvml, "pynvml", fake)
    return fake


def test_nvml_readings_in_si_units(fake_nvml: SimpleNamespace) -> None:
    gpu = Gpu(handle=object())
    assert gpu.read(1.0) == Reading(1.0, 612.5, 1410, 12.345, throttled=False, power_capped=True)
    assert gpu.driver() == "580.1"
    assert gpu.power_limit_watts() == 700.0
    fake_nvml.field.nvmlReturn = 3  # not supported: the averaged reading instead
    assert gpu.watts() == 500.0


@pytest.mark.parametrize(
    "reason", ["nvmlClocksEventReasonSwThermalSlowdown", "nvmlClocksThrottleReasonHwPowerBrakeSlowdown"]
)
def test_heat_and_power_brakes_count_as_throttled(fake_nvml: SimpleNamespace, reason: str) -> None:
    fake_nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda _: getattr(pynvml, reason)
    reading = Gpu(handle=object()).read(0.0)
    assert reading.throttled
    assert not reading.power_capped


def test_what_nvml_does_not_give_is_none(fake_nvml: SimpleNamespace) -> None:
    def refuse(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in [name for name in vars(fake_nvml) if name.startswith(("nvmlDevice", "nvmlSystem"))]:
        setattr(fake_nvml, name, refuse)
    gpu = Gpu(handle=object())
    assert gpu.read(1.0) == Reading(1.0, None, None, None, None, None)
    assert gpu.driver() is None
    assert gpu.power_limit_watts() is None


def test_the_sampler_thread_reads_and_stops(fake_nvml: SimpleNamespace) -> None:
    with Sampler(Gpu(handle=object()), interval=0.001) as sampler:
        deadline = time.perf_counter() + 5
        while len(sampler.readings) < 3 and time.perf_counter() < deadline:
            time.sleep(0.001)
    count = len(sampler.readings)
    assert count >= 3
    time.sleep(0.01)
    assert len(sampler.readings) == count
    assert sampler.over([(0.0, float("inf"))]).watts == 612.5


def test_a_cpu_has_no_nvml() -> None:
    assert Gpu.open("cpu") is None
