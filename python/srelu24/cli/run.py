"""The main job of ``srelu24 run``: check the machine, build the kernels, then tune, run and time an FFN.

Without a GPU that kernels run on they are cross-compiled for the H200 and the FFN runs on the CPU reference.
Either way the end says what was done, and what was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from srelu24.cli import doctor, live, options, views
from srelu24.shipping import catalogue
from srelu24_gen.errors import ToolchainError
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType
from srelu24_gen.target import GpuTarget, target_by_key

if TYPE_CHECKING:
    import torch


DENSITY = 0.1
"""Share of non-zero activations of a trained squared-ReLU FFN (arXiv 2503.16672), for tuning and for the check."""
CHECK_SHAPE = Shape(192, 256, 1024)
"""Small enough for a CPU; more than one row block and more than one vector of metadata."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement about the FFN's result, checked in float64."""

    statement: str
    ok: bool
    detail: str


def run(shapes: list[Shape], dtype: DType, budget_s: float, bench: bool) -> bool:
    """Does the main job, printing as it goes; whether all of it went well.

    Args:
        budget_s: seconds of tuning per shape that has no record on this GPU; 0 tunes nothing.
        bench: time the FFN against its peers at the end. Only on a GPU.
    """
    checks = doctor.diagnose()
    views.show(views.doctor_table(checks))
    if not doctor.healthy(checks):
        views.note("Mend what failed above, then run again.", style="bold red")
        return False
    gpu = doctor.this_gpu()
    target = gpu or target_by_key(options.DEFAULT_TARGET)
    if gpu and budget_s > 0:
        tune_missing(shapes, dtype, target, budget_s)
    if not build(shapes, dtype, target):
        return False
    device = "cuda" if gpu else "cpu"
    findings = check_ffn(CHECK_SHAPE, dtype, device)
    for finding in findings:
        views.note(
            f"{'ok  ' if finding.ok else 'FAIL'} {finding.statement} ({finding.detail})",
            "" if finding.ok else "bold red",
        )
    ok = all(finding.ok for finding in findings)
    if gpu and bench and ok:
        live.benchmark("ffn", shapes, dtype, [DENSITY], None)
    where = f"on {gpu.name}" if gpu else "on the CPU reference"
    views.note(f"Done: kernels built for {target.name}; the FFN ran {where} ({CHECK_SHAPE}, {dtype}) and was checked.")
    if not gpu:
        views.note(
            "Not done, for want of a GPU that kernels run on: loading, tuning, running and timing the kernels.",
            "yellow",
        )
    elif not bench:
        views.note("Not done: the benchmark (--no-bench).", "yellow")
    return ok


def tune_missing(shapes: list[Shape], dtype: DType, target: GpuTarget, budget_s: float) -> None:
    """Tunes the shapes that this user has not tuned on this GPU model yet; shipped records are only a start."""
    from srelu24.db.database import Database
    from srelu24.tuning import tuner

    tuned = {str(r.problem) for r in Database.open().user_records() if r.gpu == target.key}
    for shape in shapes:
        if tuned.issuperset(map(str, shape.gemms(dtype))):
            views.note(f"{shape} is tuned on this GPU already.")
            continue
        views.note(f"Tuning {shape} {dtype} for up to {budget_s:.0f} s; Ctrl-C keeps what was measured.")
        with live.live_view() as on_event:
            tuner.tune_ffn(*shape, dtype, density=DENSITY, budget_s=budget_s, on_event=on_event)


def build(shapes: list[Shape], dtype: DType, target: GpuTarget) -> bool:
    """Builds what the shapes need and prints it; whether everything compiled."""
    specs = catalogue.specs_for(shapes, dtype, target)
    with views.progress() as bar:
        task = bar.add_task(f"building for {target.name}", total=len(specs))
        rows = catalogue.build_kernels(specs, on_done=lambda: bar.advance(task))
    views.show(views.built_table(rows))
    return not any(row["error"] for row in rows)


def check_ffn(shape: Shape, dtype: DType, device: str) -> list[Finding]:
    """Runs the FFN and its pruned activations S, and holds both to the numerics contract (docs/numerics.md) in float64.

    Pruning makes the FFN differ from the dense one on purpose: their distance is reported, not checked.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ToolchainError("running the FFN needs PyTorch; run: pip install 'torch>=2.10'") from error
    import srelu24
    from srelu24.measuring.workload import make_ffn

    data = make_ffn(*shape, dtype, DENSITY, device)
    y = srelu24.ffn(data.x, data.w1, data.w2, mode="sparse").double()
    s = srelu24.gemm_relu2_24(data.x, data.w1).to_dense().double()
    activations = torch.relu(data.x.double() @ data.w1.double().T).square()
    dense = activations @ data.w2.double().T
    eps = torch.finfo(data.x.dtype).eps
    return [
        _prunes(s),
        _keeps_the_largest(s, activations, eps),
        _close("ffn(x, w1, w2) is S w2^T", y, s @ data.w2.double().T, eps),
        Finding("pruning moved the result away from the dense FFN", True, f"{_distance(y, dense):.2%} of its norm"),
    ]


def _prunes(s: torch.Tensor) -> Finding:
    most = int((s.unflatten(-1, (-1, 4)) != 0).sum(-1).max())
    return Finding("S has at most 2 non-zeros in every 4 neighbours", most <= 2, f"at most {most} found")


def _keeps_the_largest(s: torch.Tensor, activations: torch.Tensor, eps: float) -> Finding:
    """Up to rounding to the storage type before and after squaring: 3/2 eps, relative."""
    groups = s.unflatten(-1, (-1, 4))
    wanted = activations.unflatten(-1, (-1, 4)).topk(2).values
    found = groups.topk(2).values
    # Sums of D terms cancel: values near 0 carry the absolute error of the accumulation.
    error = ((found - wanted).abs() / (wanted + wanted.max() * eps**2)).max().item()
    return Finding("S keeps the 2 largest of every 4, squared", error < 2 * eps, f"largest relative error {error:.1e}")


def _close(statement: str, found: torch.Tensor, wanted: torch.Tensor, eps: float) -> Finding:
    error = _distance(found, wanted)
    return Finding(statement, error < eps, f"{error:.1e} of its norm")


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
