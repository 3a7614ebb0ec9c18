"""Timing kernels against each other, on a GPU that its power limit holds back. Method: docs/benchmarks.md."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

from srelu24.measuring.nvml import Gpu, Power, Sampler
from srelu24_gen.errors import Srelu24Error

T = TypeVar("T")
Call = Callable[[], Any]

_MOST_LAUNCHES = 10_000
"""Per sample, so that a kernel too short to measure cannot stall a round."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one candidate did in its rounds. Absolute values hold only next to the others of the same run."""

    ms: float
    """Median over ``samples``, milliseconds per call."""
    samples: list[float]
    """Milliseconds per call, one per round; rounds are shared by the candidates of one :func:`interleave`."""
    joules: float | None = None
    """Energy per call, of the whole GPU."""
    watts: float | None = None
    sm_mhz: float | None = None
    throttled: bool = False
    """Heat or a power brake slowed the GPU at some moment: measure again. The power limit does not count."""
    power_capped: bool = False
    energy_counted: bool = False
    """``joules`` comes from the driver's energy counter over a long window, not from watts times time."""

    @classmethod
    def of(cls, samples: list[float], power: Power | None = None) -> Self:
        """From at least one sample; joules are watts times the median."""
        power = power or Power()
        ms = median(samples)
        return cls(
            ms=ms,
            samples=list(samples),
            joules=None if power.watts is None else power.watts * ms / 1000,
            watts=power.watts,
            sm_mhz=power.sm_mhz,
            throttled=power.throttled,
            power_capped=power.power_capped,
            energy_counted=power.from_counter,
        )

    def tflops(self, flops: float) -> float:
        """Rate in TFLOP/s of a call of so many floating-point operations."""
        return flops / self.ms / 1e9


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an :func:`interleave` stands."""

    rounds: int
    """Finished rounds."""
    fraction: float
    """0 to 1, by the time it was given."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`interleave`. ``timings`` holds the finished rounds; empty if there is none."""

    def __init__(self, timings: dict[str, Timing]) -> None:
        super().__init__("measurement interrupted")
        self.timings = timings


class Clock(Protocol):
    """How long calls take. Injectable, so that the method can be tested without a GPU."""

    def now(self) -> float:
        """Host time in seconds."""

    def run(self, call: Call, launches: int, lead: int) -> float:
        """Milliseconds for ``launches`` calls back to back after ``lead`` untimed ones; waits for the last."""


class HostClock:
    """Wall time, for a CPU."""

    def now(self) -> float:
        return time.perf_counter()

    def run(self, call: Call, launches: int, lead: int) -> float:
        for _ in range(lead):
            call()
        start = time.perf_counter()
        for _ in range(launches):
            call()
        return (time.perf_counter() - start) * 1000


class CudaClock:
    """A pair of CUDA events on the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)

    def now(self) -> float:
        return time.perf_counter()

    def run(self, call: Call, launches: int, lead: int) -> float:
        # The lead keeps the GPU busy while the host gets ahead, so that no launch latency falls between the events.
        with torch.cuda.device(self._device):
            for _ in range(lead):
                call()
            self._start.record()
            for _ in range(launches):
                call()
            self._end.record()
            self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


def interleave(
    candidates: dict[str, Call],
    *,
    device: torch.device | str,
    seconds: float,
    min_rounds: int = 5,
    on_progress: Callable[[Progress], None] | None = None,
    sample_ms: float = 20.0,
    energy_seconds: float = 0.0,
    clock: Clock | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Timing]:
    """Times candidates against each other in rounds; each round times every candidate once, in a new order.

    Orders are balanced (:func:`_orders`): what a kernel leaves behind, clocks above all, falls on all others alike.

    A sample is one pair of events around about ``sample_ms`` of back-to-back launches, after a lead of a quarter of
    them (none before one or two, which take so long that a launch does not show). A warm-up of a quarter of
    ``seconds``, at most 1 s, and up to three times that while the GPU still slows down, comes before the first round.

    Args:
        candidates: name to a call that queues its work on the current stream and does not wait for it.
        device: where they run; a CPU is timed by the host's clock.
        seconds: time for the rounds; one round more may be started before it is over.
        min_rounds: rounds to do even where they take longer.
        on_progress: called after every round.
        energy_seconds: afterwards run each candidate alone for so long and take its watts and joules from the
            driver's energy counter. 0: from power readings during the samples, which blur into their neighbours.
        clock, sampler: to replace the CUDA events and NVML; a given sampler is not started or stopped.

    Raises:
        Interrupted: Ctrl-C; carries the timings of the finished rounds.
        ValueError: min_rounds is less than 1.
    """
    if min_rounds < 1:
        raise ValueError(f"min_rounds is {min_rounds}; at least 1 round is needed")
    device = torch.device(device)
    clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())
    if sampler is None:
        with Sampler(Gpu.open(device), now=clock.now) as own:
            return _Rounds(candidates, clock, own, sample_ms).run(seconds, min_rounds, energy_seconds, on_progress)
    return _Rounds(candidates, clock, sampler, sample_ms).run(seconds, min_rounds, energy_seconds, on_progress)


class _Rounds:
    """The state of one :func:`interleave`."""

    def __init__(self, candidates: dict[str, Call], clock: Clock, sampler: Sampler, sample_ms: float) -> None:
        self._candidates = candidates
        self._clock = clock
        self._sampler = sampler
        self._sample_ms = sample_ms
        self._launches = dict.fromkeys(candidates, 1)
        self._samples: dict[str, list[float]] = {name: [] for name in candidates}
        self._windows: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
        self._alone: dict[str, Power] = {}

    def run(
        self, seconds: float, min_rounds: int, energy_seconds: float, on_progress: Callable[[Progress], None] | None
    ) -> dict[str, Timing]:
        if not self._candidates:
            return {}
        try:
            self._warm_up(min(1.0, seconds / 4))
            begin = self._clock.now()
            orders, rounds = _orders(list(self._candidates), random.Random()), 0
            while rounds < min_rounds or self._clock.now() - begin < seconds:
                self._keep({name: self._sample(name) for name in next(orders)})
                rounds += 1
                if on_progress is not None:
                    done = min(rounds / min_rounds, (self._clock.now() - begin) / seconds if seconds > 0 else 1.0)
                    on_progress(Progress(rounds, min(1.0, done)))
            if energy_seconds > 0:
                self._alone = {name: self._run_alone(name, energy_seconds) for name in self._candidates}
        except KeyboardInterrupt:
            raise Interrupted(self._timings()) from None
        return self._timings()

    def _warm_up(self, seconds: float) -> None:
        for call in self._candidates.values():
            self._clock.run(call, 1, 0)  # The first call may build, load or search.
        start, before = self._clock.now(), math.inf
        while True:
            total = 0.0
            for name in self._candidates:
                ms, _ = self._sample(name)
                self._launches[name] = self._launches_for(ms, self._sample_ms)
                total += ms
            elapsed = self._clock.now() - start
            steady = total <= 1.01 * before and before <= 1.01 * total
            if (elapsed >= seconds and steady) or elapsed >= 3 * seconds:
                return
            before = total

    def _sample(self, name: str) -> tuple[float, tuple[float, float]]:
        launches = self._launches[name]
        start = self._clock.now()
        ms = self._clock.run(self._candidates[name], launches, round(launches / 4)) / launches
        return ms, (start, self._clock.now())

    def _keep(self, finished: dict[str, tuple[float, tuple[float, float]]]) -> None:
        """Only whole rounds are kept, so that samples of one index always belong together."""
        for name, (ms, window) in finished.items():
            self._samples[name].append(ms)
            self._windows[name].append(window)

    def _run_alone(self, name: str, seconds: float) -> Power:
        launches = self._launches_for(median(self._samples[name]), seconds * 1000, most=10**9)
        ms = self._clock.run(self._candidates[name], launches, -(-launches // 4))
        end = self._clock.now()
        return self._sampler.over([(end - ms / 1000, end)])

    @staticmethod
    def _launches_for(ms_per_call: float, ms: float, most: int = _MOST_LAUNCHES) -> int:
        return max(1, min(most, math.ceil(ms / max(ms_per_call, 1e-4))))

    def _timings(self) -> dict[str, Timing]:
        timings = {}
        for name, samples in self._samples.items():
            if samples:
                rounds = self._sampler.over(self._windows[name])
                alone = self._alone.get(name, Power())
                best = rounds if alone.watts is None else alone
                power = Power(
                    watts=best.watts,
                    sm_mhz=rounds.sm_mhz,
                    throttled=rounds.throttled or alone.throttled,
                    power_capped=rounds.power_capped or alone.power_capped,
                    from_counter=best.from_counter,
                )
                timings[name] = Timing.of(samples, power)
        return timings


def _orders(names: list[str], rng: random.Random) -> Iterator[list[str]]:
    """Orders for round after round, balanced for carry-over: Williams designs (1949), one after the other.

    Over the n rounds of a design, 2 n where n is odd, every name comes equally often at every place, and equally often
    right after every other name. Which name takes which part, and the order of the rounds, is drawn anew each time, so
    that not even a part of a design favours anybody over many runs.
    """
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(n)]  # 0, 1, -1, 2, -2, ...: all differences once
    rows = [[(start + step) % n for step in zigzag] for start in range(n)]
    if n % 2:
        rows += [row[::-1] for row in rows]
    while True:
        drawn = rng.sample(names, n)
        for row in rng.sample(rows, len(rows)):
            yield [drawn[i] for i in row]


def ratio(a: Timing, b: Timing) -> float:
    """How many times faster ``a`` is than ``b``: the median over rounds of b's sample over a's.

    Raises:
        ValueError: they are not of the same run.
    """
    if len(a.samples) != len(b.samples):
        raise ValueError(f"timings of {len(a.samples)} and {len(b.samples)} rounds; ratios need the same run")
    return median(y / x for x, y in zip(a.samples, b.samples, strict=True))


class Captured(Generic[T]):
    """A piece of GPU work to repeat: ``call`` queues it, ``output`` is what it wrote last."""

    def __init__(self, call: Call, output: Callable[[], T], note: str | None = None) -> None:
        self.call = call
        self._output = output
        self.note = note
        """Why this is not a CUDA graph, if it is not."""

    @property
    def output(self) -> T:
        return self._output()


def graph_pool(device: torch.device | str) -> Any:
    """A memory pool for graphs that never run at the same time; None where there are no graphs."""
    return torch.cuda.graph_pool_handle() if torch.device(device).type == "cuda" else None


def capture(run: Callable[[], T], *, device: torch.device | str, pool: Any = None, calls: int = 3) -> Captured[T]:
    """Captures ``run`` in a CUDA graph, after some calls on a side stream, so that launches cost no host time.

    Where capture fails, and on a CPU, the call stays what it is and ``note`` says why.

    Args:
        run: queues work and returns its output, which every replay writes again at the same place.
        pool: of :func:`graph_pool`, to share memory with other graphs.
        calls: before the capture, at least 1: what is loaded or searched on first use must not be captured.

    Raises:
        Whatever ``run`` raises outside a capture.
    """
    device = torch.device(device)
    latest: list[T] = []

    def direct() -> None:
        latest[:] = [run()]

    if device.type != "cuda":
        direct()
        return Captured(direct, lambda: latest[0], "direct calls: no CUDA graphs on this device")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(calls):
                direct()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        latest.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                output = run()
        except (RuntimeError, Srelu24Error) as error:
            torch.cuda.synchronize()
            direct()
            return Captured(direct, lambda: latest[0], f"direct calls: graph capture failed ({_first_line(error)})")
    return Captured(partial(_replay, graph, run), lambda: output)


def _replay(graph: torch.cuda.CUDAGraph, run: Callable[[], Any]) -> None:
    """``run`` comes along so that the tensors it uses live as long as the graph, which only knows their addresses."""
    graph.replay()


def host_us(call: Call, *, device: torch.device | str, calls: int = 100, batches: int = 20) -> float:
    """Host microseconds per call, median over batches; each batch starts on an idle GPU and never waits for it."""
    device = torch.device(device)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def batch() -> float:
        settle()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls * 1e6

    batch()
    times = [batch() for _ in range(batches)]
    settle()
    return median(times)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
