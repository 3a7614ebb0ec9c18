"""From the timings of candidates to the rows of a result file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, UnsetType

from srelu24.bench import peers, peers_fp8
from srelu24.bench.peers import Case, Peer
from srelu24.bench.results import Candidate, Row
from srelu24.measuring.timing import Timing, ratio
from srelu24_gen.spec import Activation, pruning_op

PEERS: dict[str, tuple[Peer, ...]] = {
    "gemm": peers.GEMM,
    "memory": peers.MEMORY,
    "ffn": peers.FFN,
    "sweep": peers.SWEEP,
}
PEERS |= {"fp8_gemm": peers_fp8.GEMM, "fp8_memory": peers_fp8.MEMORY, "fp8_ffn": peers_fp8.FFN}
"""By part of a benchmark: its candidates."""


def candidate(
    timing: Timing | None,
    flops: int = 0,
    *,
    why: str = "interrupted before the first round",
    flops_per_clock: int = 0,
    **more: Any,
) -> Candidate:
    """A timing as a result file has it.

    Args:
        timing: None where there is none.
        flops: of a call; 0 where there is no arithmetic worth counting.
        why: the error where there is no timing.
        flops_per_clock: of the tensor cores, for their utilisation by a GEMM alone.
        more: other fields of :class:`Candidate`.
    """
    if timing is None:
        return Candidate(ms=None, tflops=None, joules=None, sm_mhz=None, watts=None, samples=0, error=why)
    return Candidate(
        ms=timing.ms,
        tflops=timing.tflops(flops) if flops else None,
        joules=timing.joules,
        sm_mhz=timing.sm_mhz,
        watts=timing.watts,
        samples=len(timing.samples),
        utilisation=utilisation(timing, flops, flops_per_clock),
        throttled=True if timing.throttled else UNSET,
        **more,
    )


@dataclass(slots=True)
class Group:
    """The candidates of one interleaved run."""

    timings: dict[str, Timing] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def candidate(self, name: str, flops: int = 0, nbytes: int = 0, flops_per_clock: int = 0) -> Candidate:
        timing = self.timings.get(name)
        details: dict[str, Any] = {}
        if name in self.errors:
            details["why"] = self.errors[name]
        if timing is not None and nbytes:
            details["gbps"] = nbytes / timing.ms / 1e6
        if timing is not None and name in self.notes:
            details["note"] = self.notes[name]
        return candidate(timing, flops, flops_per_clock=flops_per_clock, **details)


def utilisation(timing: Timing, flops: int, flops_per_clock: int) -> float | UnsetType:
    """Share of the tensor cores' rate at the clock of the timing; UNSET where either is not known."""
    if not flops_per_clock or not timing.sm_mhz:
        return UNSET
    return flops / (timing.ms * timing.sm_mhz * 1e3 * flops_per_clock)


def _row(
    op: str,
    case: Case,
    group: Group,
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
        shape=str(case.shape),
        density=case.density,
        candidates={
            name: group.candidate(
                peer, flops, (nbytes or {}).get(name, 0), peers.tensor_rate(case, peer) if alone else 0
            )
            for name, peer in names.items()
        },
        speedup={name: ratio(ours, t) for name, t in timings.items() if name != "srelu24"} if ours else {},
        measured_density=case.measured_density,
        activation=UNSET if case.activation is Activation.RELU2 else case.activation.value,
    )


def _gemm_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
    gemm1 = {"srelu24": "gemm1_fused", "gemm": "gemm1_dense", "cublas": "gemm1_cublas"}
    gemm2 = {"srelu24": "gemm2_sparse", "gemm": "gemm2_dense"}
    gemm2 |= {"cublas": "gemm2_cublas", "cusparselt": "gemm2_cusparselt"}
    dense = {"srelu24": "gemm1_dense", "cublas": "gemm1_cublas"}
    by_op = {pruning_op(case.activation).value: gemm1, "spgemm": gemm2, "gemm": dense}
    return [_row(op, case, groups["gemm"], names, case.gemm_flops, alone=True) for op, names in by_op.items()]


def _memory_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
    dense = case.h.nbytes
    nbytes = {"srelu24": dense + case.s.values.nbytes + case.s.metadata.nbytes, "copy": 2 * dense}
    row = _row("sparsify24", case, groups["memory"], {"srelu24": "sparsify24", "copy": "copy"}, 0, nbytes=nbytes)
    row.speedup = {}  # They move different amounts; compare GB/s.
    return [row]


def _ffn_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
    names = {peer.name: peer.name for peer in PEERS["ffn"]}
    row = _row("ffn_forward", case, groups["ffn"], names, 2 * case.gemm_flops)
    ours, alone = groups["ffn"].timings.get("srelu24"), groups["gemm"].timings
    dense = [t.ms for name, t in alone.items() if name in peers.DENSE_GEMMS]
    sparse = [t.ms for name, t in alone.items() if name in peers.SPARSE_GEMMS]
    if ours is not None and dense and sparse:
        row.speed_of_light = (min(dense) + min(sparse)) / ours.ms
    return [row]


def _sweep_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
    names = {peer.name: peer.name for peer in PEERS["sweep"]}
    row = _row("sweep", case, groups["sweep"], names, 2 * case.gemm_flops)
    row.candidates["srelu24"].note = peers.chosen_way(case)
    return [row]


def _fp8_gemm_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
    """``recipe`` says what GEMM1 writes: bf16 for rowwise, e4m3 for the others."""
    gemm1 = {"srelu24": "gemm1_e4m3", "promoted": "gemm1_promoted", "cublas": "gemm1_cublas"}
    gemm2 = {"srelu24": "gemm2_sparse", "promoted": "gemm2_promoted"}
    gemm2 |= {"cublas": "gemm2_cublas", "cusparselt": "gemm2_cusparselt"}
    by_op = [
        ("gemm_relu2_24", "rowwise", {"srelu24": "gemm1_bf16", "cublas": "gemm1_cublas"}),
        ("gemm_relu2_24", "predicted", gemm1),
        ("spgemm", None, gemm2),
    ]
    group = groups["fp8_gemm"]
    return [_fp8(_row(op, case, group, names, case.gemm_flops, alone=True), recipe) for op, recipe, names in by_op]


def _fp8_memory_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
    x, kept = case.shape.m * case.shape.d, case.shape.m * case.shape.f // 2
    rows = []
    for op, nbytes in (("quantize_rows", 3 * x), ("square_rows", 3 * kept)):
        names = {"srelu24": op, "copy": "copy"}
        row = _row(op, case, groups["fp8_memory"], names, 0, nbytes={"srelu24": nbytes, "copy": 4 * x})
        row.speedup = {}  # They move different amounts; compare GB/s.
        rows.append(_fp8(row, None))
    return rows


def _fp8_ffn_rows(case: Case, groups: dict[str, Group]) -> list[Row]:
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


ROWS = {"gemm": _gemm_rows, "memory": _memory_rows, "ffn": _ffn_rows, "sweep": _sweep_rows}
ROWS |= {"fp8_gemm": _fp8_gemm_rows, "fp8_memory": _fp8_memory_rows, "fp8_ffn": _fp8_ffn_rows}
"""By part: its rows, from the groups measured so far."""

ENERGY_SECONDS = {"gemm": 0.5, "memory": 0.0, "ffn": 0.5, "sweep": 0.0}
ENERGY_SECONDS |= {"fp8_gemm": 0.5, "fp8_memory": 0.0, "fp8_ffn": 0.5}
"""By part: how long each candidate repeats alone for its energy, at most; a tenth of the timing where that is less."""
