"""Benchmarks against the peers. Method: docs/benchmarks.md; what they write: :mod:`srelu24.bench.results`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from srelu24.bench import peers
from srelu24.bench.peers import Case, Output, Peer, relative_error
from srelu24.bench.peers_fp8 import Fp8Case
from srelu24.bench.results import BenchFile, Row, check_writable
from srelu24.bench.rows import ENERGY_SECONDS, PEERS, ROWS, Group
from srelu24.measuring import machine, timing
from srelu24.measuring.machine import require_gpu
from srelu24.measuring.timing import Captured, Interrupted, Progress
from srelu24.measuring.workload import make_ffn, poison
from srelu24.ops import functions
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.models import Shape
from srelu24_gen.spec import Activation, DType


@dataclass(frozen=True, slots=True)
class BenchEvent:
    """Something happened: ``text`` says it in one line."""

    kind: str
    """case, failed, progress or row."""
    text: str
    fraction: float = 0.0
    """How far the whole benchmark is, 0 to 1."""
    row: Row | None = None


OnEvent = Callable[[BenchEvent], None]


def bench_ffn(
    shapes: Sequence[Shape],
    dtype: DType,
    densities: Sequence[float] = (0.1, 0.5),
    *,
    seconds_per_shape: float = 20.0,
    activation: Activation = Activation.RELU2,
    json_path: Path | None = None,
    on_event: OnEvent | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """Whole forward passes against every peer, and in the same run each kernel alone.

    Args:
        densities: shares of non-zero activations before pruning; each is a case of its own.
        seconds_per_shape: of timing rounds, per shape and density; preparing, warm-up and checking come on top.
        activation: between the layers.
        json_path: result file, written anew after every group of rows, so that nothing measured is lost.
        on_event: called with :class:`BenchEvent`.

    Raises:
        Unsupported: no CUDA GPU, or a shape, density or time that makes no sense.
        KeyboardInterrupt: Ctrl-C; what was measured is in the file, the interrupted rows from fewer rounds.
    """
    _check_arguments(shapes, densities, seconds_per_shape)
    case = partial(Case.make, activation=activation)
    bench = _Bench(dtype, torch.device(device), json_path, on_event, case)
    bench.file.python_overhead_us = bench.python_overhead()
    return bench.run(shapes, densities, seconds_per_shape, {"gemm": 0.5, "memory": 0.05, "ffn": 0.45})


def bench_gemm(
    shapes: Sequence[Shape],
    dtype: DType,
    densities: Sequence[float] = (0.1, 0.5),
    *,
    seconds_per_shape: float = 10.0,
    zeros: bool = False,
    activation: Activation = Activation.RELU2,
    json_path: Path | None = None,
    on_event: OnEvent | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """Each kernel alone, against cuBLAS, cuSPARSELt and a copy. Arguments and errors as in :func:`bench_ffn`.

    Args:
        zeros: the GEMMs on nothing but zeros as well.
        activation: between the layers.
    """
    _check_arguments(shapes, densities, seconds_per_shape)
    case = partial(Case.make, activation=activation)
    bench = _Bench(dtype, torch.device(device), json_path, on_event, case)
    return bench.run(shapes, densities, seconds_per_shape, {"gemm": 0.9, "memory": 0.1}, zeros=zeros)


def bench_sweep(
    shapes: Sequence[Shape],
    dtype: DType,
    densities: Sequence[float] = (0.1,),
    *,
    seconds_per_shape: float = 2.0,
    json_path: Path | None = None,
    on_event: OnEvent | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """What ``ffn(mode="auto")`` chooses, against the sparse pair, every dense way and torch.compile: over numbers of
    tokens it shows the crossover. Arguments and errors as in :func:`bench_ffn`."""
    _check_arguments(shapes, densities, seconds_per_shape)
    bench = _Bench(dtype, torch.device(device), json_path, on_event)
    return bench.run(shapes, densities, seconds_per_shape, {"sweep": 1.0})


def bench_fp8(
    shapes: Sequence[Shape],
    densities: Sequence[float] = (0.1, 0.5),
    *,
    seconds_per_shape: float = 20.0,
    json_path: Path | None = None,
    on_event: OnEvent | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """The 8-bit recipes, and their kernels alone, against ``torch._scaled_mm`` with row-wise scales, compiled, and
    cuSPARSELt. X is bf16. Arguments and errors as in :func:`bench_ffn`."""
    _check_arguments(shapes, densities, seconds_per_shape)
    bench = _Bench(DType.BF16, torch.device(device), json_path, on_event, Fp8Case.make)
    return bench.run(shapes, densities, seconds_per_shape, {"fp8_gemm": 0.65, "fp8_memory": 0.05, "fp8_ffn": 0.3})


class _Bench:
    """One run: its file, its device and how far it is."""

    def __init__(
        self,
        dtype: DType,
        device: torch.device,
        json_path: Path | None,
        on_event: OnEvent | None,
        case: Callable[..., Case] = Case.make,
    ) -> None:
        require_gpu(device)
        self._case = case
        self.file = BenchFile(env=machine.environment(device), rows=[])
        self._dtype, self._device, self._path, self._on_event = dtype, device, json_path, on_event
        self._fraction = 0.0
        check_writable(json_path)

    def run(
        self,
        shapes: Sequence[Shape],
        densities: Sequence[float],
        seconds: float,
        parts: dict[str, float],
        zeros: bool = False,
    ) -> BenchFile:
        kinds = [(density, False) for density in densities] + [(0.0, True)] * zeros
        cases = len(shapes) * len(kinds)
        for number, (shape, (density, zero)) in enumerate(itertools.product(shapes, kinds)):
            self._fraction = number / cases
            data = "zeros" if zero else f"density {density:g}"
            self._event("case", f"{shape} {self._dtype}, {data}: data and references")
            case = self._case(shape, self._dtype, density, self._device, zeros=zero)
            groups: dict[str, Group] = {}
            for part, share in parts.items():
                if zero and part.endswith("memory"):
                    continue
                groups[part] = self._measure(part, case, seconds * share, share / cases)
                rows = ROWS[part](case, groups)
                for row in rows if zero else ():
                    row.zeros = True
                self._record(rows)
                if groups[part].interrupted:
                    raise KeyboardInterrupt
            del case, groups
            torch.cuda.empty_cache()
        return self.file

    def python_overhead(self) -> dict[str, float]:
        """Host microseconds per eager call where the GPU has next to nothing to do."""
        data = make_ffn(64, 768, 3072, self._dtype, 0.1, self._device)
        overhead = {}
        for name, ffn in (("srelu24", partial(functions.ffn, mode="sparse")), ("eager", peers.plain_ffn)):
            try:
                overhead[name] = timing.host_us(partial(ffn, data.x, data.w1, data.w2), device=self._device)
            except Exception as error:
                self._event("failed", f"Python overhead of {name}: {_reason(error)}")
        return overhead

    def _measure(self, part: str, case: Case, seconds: float, share: float) -> Group:
        """Builds, checks, times and checks again the candidates of one part."""
        group = Group()
        ready: dict[str, tuple[Peer, Captured[Output]]] = {}
        pool = timing.graph_pool(self._device)
        for peer in PEERS[part]:
            try:
                captured = timing.capture(peer.build(case), device=self._device, pool=pool)
                if captured.note:
                    group.notes[peer.name] = captured.note
                    pool = timing.graph_pool(self._device)  # A failed capture may have spoiled the shared one.
                _check_output(peer, case, captured)
                ready[peer.name] = peer, captured
            except Exception as error:  # Whatever a peer dies of, its row says so and the others go on.
                self._fail(group, case, peer.name, _reason(error))
        begin = self._fraction

        def progress(now: Progress) -> None:
            self._fraction = begin + share * now.fraction
            self._event("progress", f"{case.shape}: {part}, round {now.rounds}")

        try:
            group.timings = timing.interleave(
                {name: captured.call for name, (_, captured) in ready.items()},
                device=self._device,
                seconds=seconds,
                on_progress=progress,
                energy_seconds=min(ENERGY_SECONDS[part], seconds / 10),
            )
        except Interrupted as interrupted:
            group.timings, group.interrupted = interrupted.timings, True
        self._fraction = begin + share
        for name, (peer, captured) in ready.items():
            try:
                _check_output(peer, case, captured)
            except Exception as error:  # As above; a result that went wrong under load has no time.
                group.timings.pop(name, None)
                self._fail(group, case, name, _reason(error))
        return group

    def _fail(self, group: Group, case: Case, name: str, reason: str) -> None:
        group.errors[name] = reason
        self._event("failed", f"{case.shape}: {name}: {reason}")

    def _record(self, rows: list[Row]) -> None:
        self.file.rows += rows
        if self._path is not None:
            self.file.save(self._path)
        for row in rows:
            self._event("row", _summary(row), row)

    def _event(self, kind: str, text: str, row: Row | None = None) -> None:
        if self._on_event is not None:
            self._on_event(BenchEvent(kind, text, self._fraction, row))


def _check_output(peer: Peer, case: Case, captured: Captured[Output]) -> None:
    """Poisons the output, runs what is going to be timed, compares.

    Raises:
        Unsupported: it is wrong.
    """
    poison(captured.output)
    captured.call()
    error = relative_error(captured.output, peer.expect(case))
    allowed = peer.tolerance or peers.TOLERANCE[case.dtype]
    if not error <= allowed:  # NaN compares false.
        raise Unsupported(f"wrong result: relative error {error:.2g}, allowed {allowed:g}")


def _summary(row: Row) -> str:
    ours = row.candidates["srelu24"]
    text = f"{row.op} {row.shape} {row.dtype}, {'zeros' if row.zeros is True else f'density {row.density:g}'}: "
    text += ours.error if isinstance(ours.error, str) else f"{ours.ms:.3f} ms"
    return text + "".join(f", {ratio:.3f}x {peer}" for peer, ratio in row.speedup.items())


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, Srelu24Error) and first else f"{type(error).__name__}: {first}"


def _check_arguments(shapes: Sequence[Shape], densities: Sequence[float], seconds: float) -> None:
    if not shapes or not densities:
        raise Unsupported("a benchmark needs at least one shape MxDxF and one density")
    for shape in shapes:
        if min(shape) < 1:
            raise Unsupported(f"shape {shape} cannot be measured; MxDxF with whole numbers from 1 is needed")
    for density in densities:
        if not 0 <= density <= 1:
            raise Unsupported(f"density is {density}; a share of non-zero activations from 0 to 1 is needed")
    if not seconds > 0:
        raise Unsupported(f"{seconds} seconds per shape were given; more than 0 are needed")
