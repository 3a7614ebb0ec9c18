"""Benchmarks against the peers. Method: docs/benchmarks.md; what they write: :mod:`srelu24.results`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from msgspec import UNSET, UnsetType

from srelu24 import measure, ops, peers, peers_fp8
from srelu24.measure import Captured, Interrupted, Progress, Timing
from srelu24.peers import Case, Output, Peer, relative_error
from srelu24.peers_fp8 import Fp8Case
from srelu24.results import BenchFile, Candidate, Row
from srelu24.workload import make_ffn, poison
from srelu24_gen.errors import Srelu24Error, Unsupported
from srelu24_gen.spec import DType

Shape = tuple[int, int, int]
"""M tokens, D model width, F hidden width."""


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
    json_path: Path | None = None,
    on_event: OnEvent | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """Whole forward passes against every peer, and in the same run each kernel alone.

    Args:
        shapes: (M, D, F).
        densities: shares of non-zero activations before pruning; each is a case of its own.
        seconds_per_shape: of timing rounds, per shape and density; preparing, warm-up and checking come on top.
        json_path: result file, written anew after every group of rows, so that nothing measured is lost.
        on_event: called with :class:`BenchEvent`.

    Raises:
        Unsupported: no CUDA GPU, or a shape, density or time that makes no sense.
        KeyboardInterrupt: Ctrl-C; what was measured is in the file, the interrupted rows from fewer rounds.
    """
    _check_arguments(shapes, densities, seconds_per_shape)
    bench = _Bench(dtype, torch.device(device), json_path, on_event)
    bench.file.python_overhead_us = bench.python_overhead()
    return bench.run(shapes, densities, seconds_per_shape, {"gemm": 0.3, "memory": 0.1, "ffn": 0.6})


def bench_gemm(
    shapes: Sequence[Shape],
    dtype: DType,
    densities: Sequence[float] = (0.1, 0.5),
    *,
    seconds_per_shape: float = 10.0,
    zeros: bool = False,
    json_path: Path | None = None,
    on_event: OnEvent | None = None,
    device: torch.device | str = "cuda",
) -> BenchFile:
    """Each kernel alone, against cuBLAS, cuSPARSELt and a copy. Arguments and errors as in :func:`bench_ffn`.

    Args:
        zeros: the GEMMs on nothing but zeros as well.
    """
    _check_arguments(shapes, densities, seconds_per_shape)
    bench = _Bench(dtype, torch.device(device), json_path, on_event)
    return bench.run(shapes, densities, seconds_per_shape, {"gemm": 0.8, "memory": 0.2}, zeros=zeros)


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
    bench = _Bench(DType.BF16, torch.device(device), json_path, on_event, Fp8Case)
    return bench.run(shapes, densities, seconds_per_shape, {"fp8_gemm": 0.3, "fp8_memory": 0.1, "fp8_ffn": 0.6})


@dataclass(slots=True)
class _Group:
    """The candidates of one interleaved run."""

    timings: dict[str, Timing] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def candidate(self, name: str, flops: int = 0, nbytes: int = 0, flops_per_clock: int = 0) -> Candidate:
        timing = self.timings.get(name)
        if timing is None:
            why = self.errors.get(name, "interrupted before the first round")
            return Candidate(ms=None, tflops=None, joules=None, sm_mhz=None, watts=None, samples=0, error=why)
        return Candidate(
            ms=timing.ms,
            tflops=timing.tflops(flops) if flops else None,
            joules=timing.joules,
            sm_mhz=timing.sm_mhz,
            watts=timing.watts,
            samples=len(timing.samples),
            gbps=nbytes / timing.ms / 1e6 if nbytes else UNSET,
            utilisation=_utilisation(timing, flops, flops_per_clock),
            throttled=True if timing.throttled else UNSET,
            note=self.notes.get(name, UNSET),
        )


class _Bench:
    """One run: its file, its device and how far it is."""

    def __init__(
        self,
        dtype: DType,
        device: torch.device,
        json_path: Path | None,
        on_event: OnEvent | None,
        case: type[Case] = Case,
    ) -> None:
        _require_gpu(device)
        self._case = case
        self.file = BenchFile(env=measure.environment(device), rows=[])
        self._dtype, self._device, self._path, self._on_event = dtype, device, json_path, on_event
        self._fraction = 0.0
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=json_path.parent).close()  # Fails now, not after the first case.

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
            self._event("case", f"{_shape_name(shape)} {self._dtype}, {data}: data and references")
            case = self._case.make(shape, self._dtype, density, self._device, zeros=zero)
            groups: dict[str, _Group] = {}
            for part, share in parts.items():
                if zero and part.endswith("memory"):
                    continue
                groups[part] = self._measure(part, case, seconds * share, share / cases)
                rows = _ROWS[part](case, groups)
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
        for name, ffn in (("srelu24", partial(ops.ffn, mode="sparse")), ("eager", peers.plain_ffn)):
            try:
                overhead[name] = measure.host_us(partial(ffn, data.x, data.w1, data.w2), device=self._device)
            except Exception as error:
                self._event("failed", f"Python overhead of {name}: {_reason(error)}")
        return overhead

    def _measure(self, part: str, case: Case, seconds: float, share: float) -> _Group:
        """Builds, checks, times and checks again the candidates of one part."""
        group = _Group()
        ready: dict[str, tuple[Peer, Captured[Output]]] = {}
        pool = measure.graph_pool(self._device)
        for peer in _PEERS[part]:
            try:
                captured = measure.capture(peer.build(case), device=self._device, pool=pool)
                if captured.note:
                    group.notes[peer.name] = captured.note
                    pool = measure.graph_pool(self._device)  # A failed capture may have spoiled the shared one.
                _check_output(peer, case, captured)
                ready[peer.name] = peer, captured
            except Exception as error:  # Whatever a peer dies of, its row says so and the others go on.
                self._fail(group, case, peer.name, _reason(error))
        begin = self._fraction

        def progress(now: Progress) -> None:
            self._fraction = begin + share * now.fraction
            self._event("progress", f"{case.name}: {part}, round {now.rounds}")

        try:
            group.timings = measure.interleave(
                {name: captured.call for name, (_, captured) in ready.items()},
                device=self._device,
                seconds=seconds,
                on_progress=progress,
                energy_seconds=_ENERGY_SECONDS[part],
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

    def _fail(self, group: _Group, case: Case, name: str, reason: str) -> None:
        group.errors[name] = reason
        self._event("failed", f"{case.name}: {name}: {reason}")

    def _record(self, rows: list[Row]) -> None:
        self.file.rows += rows
        if self._path is not None:
            self.file.save(self._path)
        for row in rows:
            self._event("row", _summary(row), row)

    def _event(self, kind: str, text: str, row: Row | None = None) -> None:
        if self._on_event is not None:
            self._on_event(BenchEvent(kind, text, self._fraction, row))


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda" or not torch.cuda.is_available():
        raise Unsupported(
            "benchmarks time kernels on an NVIDIA GPU and PyTorch sees none; run `srelu24 doctor` to find out why"
        )


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


def _utilisation(timing: Timing, flops: int, flops_per_clock: int) -> float | UnsetType:
    if not flops_per_clock or not timing.sm_mhz:
        return UNSET
    return flops / (timing.ms * timing.sm_mhz * 1e3 * flops_per_clock)


def _row(
    op: str,
    case: Case,
    group: _Group,
    names: dict[str, str],
    flops: int,
    *,
    nbytes: dict[str, int] | None = None,
    alone: bool = False,
) -> Row:
    """``names``: candidate in the row to peer in the group; the first is srelu24. ``alone``: each is one GEMM."""
    timings = {name: group.timings[peer] for name, peer in names.items() if peer in group.timings}
    ours = timings.get("srelu24")
    return Row(
        op=op,
        dtype=case.dtype.value,
        shape=case.name,
        density=case.density,
        candidates={
            name: group.candidate(
                peer, flops, (nbytes or {}).get(name, 0), peers.tensor_rate(case, peer) if alone else 0
            )
            for name, peer in names.items()
        },
        speedup={name: measure.ratio(ours, t) for name, t in timings.items() if name != "srelu24"} if ours else {},
        measured_density=case.measured_density,
    )


def _gemm_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    gemm1 = {"srelu24": "gemm1_fused", "gemm": "gemm1_dense", "cublas": "gemm1_cublas"}
    gemm2 = {"srelu24": "gemm2_sparse", "gemm": "gemm2_dense"}
    gemm2 |= {"cublas": "gemm2_cublas", "cusparselt": "gemm2_cusparselt"}
    dense = {"srelu24": "gemm1_dense", "cublas": "gemm1_cublas"}
    by_op = {"gemm_relu2_24": gemm1, "spgemm": gemm2, "gemm": dense}
    return [_row(op, case, groups["gemm"], names, case.gemm_flops, alone=True) for op, names in by_op.items()]


def _memory_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    dense = case.h.nbytes
    nbytes = {"srelu24": dense + case.s.values.nbytes + case.s.metadata.nbytes, "copy": 2 * dense}
    row = _row("sparsify24", case, groups["memory"], {"srelu24": "sparsify24", "copy": "copy"}, 0, nbytes=nbytes)
    row.speedup = {}  # They move different amounts; compare GB/s.
    return [row]


def _ffn_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    names = {peer.name: peer.name for peer in _PEERS["ffn"]}
    row = _row("ffn_forward", case, groups["ffn"], names, 2 * case.gemm_flops)
    ours, alone = groups["ffn"].timings.get("srelu24"), groups["gemm"].timings
    dense = [t.ms for name, t in alone.items() if name in peers.DENSE_GEMMS]
    sparse = [t.ms for name, t in alone.items() if name in peers.SPARSE_GEMMS]
    if ours is not None and dense and sparse:
        row.speed_of_light = (min(dense) + min(sparse)) / ours.ms
    return [row]


def _sweep_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    names = {peer.name: peer.name for peer in _PEERS["sweep"]}
    row = _row("sweep", case, groups["sweep"], names, 2 * case.gemm_flops)
    row.candidates["srelu24"].note = peers.chosen_way(case)
    return [row]


def _fp8_gemm_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    """``recipe`` says what GEMM1 writes: bf16 for rowwise, e4m3 for the others."""
    gemm2 = {"srelu24": "gemm2_sparse", "cublas": "gemm2_cublas", "cusparselt": "gemm2_cusparselt"}
    by_op = [
        ("gemm_relu2_24", "rowwise", {"srelu24": "gemm1_bf16", "cublas": "gemm1_cublas"}),
        ("gemm_relu2_24", "predicted", {"srelu24": "gemm1_e4m3", "cublas": "gemm1_cublas"}),
        ("spgemm", None, gemm2),
    ]
    return [_fp8(_row(op, case, groups["fp8_gemm"], names, case.gemm_flops), recipe) for op, recipe, names in by_op]


def _fp8_memory_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    x, kept = case.m * case.d, case.m * case.f // 2
    rows = []
    for op, nbytes in (("quantize_rows", 3 * x), ("square_rows", 3 * kept)):
        names = {"srelu24": op, "copy": "copy"}
        row = _row(op, case, groups["fp8_memory"], names, 0, nbytes={"srelu24": nbytes, "copy": 4 * x})
        row.speedup = {}  # They move different amounts; compare GB/s.
        rows.append(_fp8(row, None))
    return rows


def _fp8_ffn_rows(case: Case, groups: dict[str, _Group]) -> list[Row]:
    group, alone = groups["fp8_ffn"], groups["fp8_gemm"].timings
    dense = [t.ms for name, t in alone.items() if name in ("gemm1_e4m3", "gemm1_bf16", "gemm1_cublas", "gemm2_cublas")]
    sparse = [t.ms for name, t in alone.items() if name in peers.SPARSE_GEMMS]
    rows = []
    for recipe in peers_fp8.RECIPES:
        names = {"srelu24": recipe, "torch_compile": "torch_compile"}
        row = _fp8(_row("ffn_forward", case, group, names, 2 * case.gemm_flops), recipe)
        if (ours := group.timings.get(recipe)) and dense and sparse:
            row.speed_of_light = (min(dense) + min(sparse)) / ours.ms
        rows.append(row)
    return rows


def _fp8(row: Row, recipe: str | None) -> Row:
    row.dtype, row.recipe = "fp8_e4m3", recipe
    return row


_PEERS = {"gemm": peers.GEMM, "memory": peers.MEMORY, "ffn": peers.FFN, "sweep": peers.SWEEP}
_PEERS |= {"fp8_gemm": peers_fp8.GEMM, "fp8_memory": peers_fp8.MEMORY, "fp8_ffn": peers_fp8.FFN}
_ROWS = {"gemm": _gemm_rows, "memory": _memory_rows, "ffn": _ffn_rows, "sweep": _sweep_rows}
_ROWS |= {"fp8_gemm": _fp8_gemm_rows, "fp8_memory": _fp8_memory_rows, "fp8_ffn": _fp8_ffn_rows}
_ENERGY_SECONDS = {"gemm": 0.5, "memory": 0.0, "ffn": 0.5, "sweep": 0.0}
_ENERGY_SECONDS |= {"fp8_gemm": 0.5, "fp8_memory": 0.0, "fp8_ffn": 0.5}


def _summary(row: Row) -> str:
    ours = row.candidates["srelu24"]
    text = f"{row.op} {row.shape} {row.dtype}, {'zeros' if row.zeros is True else f'density {row.density:g}'}: "
    text += ours.error if isinstance(ours.error, str) else f"{ours.ms:.3f} ms"
    return text + "".join(f", {ratio:.3f}x {peer}" for peer, ratio in row.speedup.items())


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, Srelu24Error) and first else f"{type(error).__name__}: {first}"


def _shape_name(shape: Shape) -> str:
    return "x".join(str(size) for size in shape)


def _check_arguments(shapes: Sequence[Shape], densities: Sequence[float], seconds: float) -> None:
    if not shapes or not densities:
        raise Unsupported("a benchmark needs at least one shape MxDxF and one density")
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise Unsupported(
                f"shape {_shape_name(shape)} cannot be measured; MxDxF with whole numbers from 1 is needed"
            )
    for density in densities:
        if not 0 <= density <= 1:
            raise Unsupported(f"density is {density}; a share of non-zero activations from 0 to 1 is needed")
    if not seconds > 0:
        raise Unsupported(f"{seconds} seconds per shape were given; more than 0 are needed")
