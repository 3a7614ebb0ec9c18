"""Plots from result files, for the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from srelu24.figures import figure
from srelu24.report import PEERS, load_results, of_op, over_compile
from srelu24.results import Row
from srelu24_gen.errors import RecordError


def plot_ffn(results_dir: Path, out_svg: Path) -> None:
    """Bars of the FFN's speed-up over each peer, one panel per GPU, type and density.

    Raises:
        RecordError: there is nothing to plot, or a file is no result file.
        Srelu24Error: matplotlib is not installed.
    """
    panels: dict[tuple[str, str, float], list[Row]] = {}
    for result in of_op(load_results(results_dir), "ffn_forward"):
        if result.row.speedup and result.row.recipe is None:
            panels.setdefault((result.gpu, result.row.dtype, result.row.density), []).append(result.row)
    if not panels:
        raise RecordError(f"{results_dir} has no FFN results to plot; run `srelu24 bench ffn` first")
    titles = [f"FFN forward on {gpu}, {dtype}, {density:.0%} non-zero activations" for gpu, dtype, density in panels]
    _draw(out_svg, dict(zip(titles, panels.values(), strict=True)), _bars)


def plot_sweep(results_dir: Path, out_svg: Path) -> None:
    """Speed over torch.compile by tokens: sparse, the best dense way, and what was chosen; a panel per width.

    Raises:
        RecordError: there is nothing to plot, or a file is no result file.
        Srelu24Error: matplotlib is not installed.
    """
    panels: dict[str, list[Row]] = {}
    for result in of_op(load_results(results_dir), "sweep"):
        d, f = result.row.shape.split("x")[1:]
        panels.setdefault(f"D = {d}, F = {f} on {result.gpu}, {result.row.dtype}", []).append(result.row)
    if not panels:
        raise RecordError(f"{results_dir} has no sweep to plot; run `srelu24 bench sweep` first")
    _draw(out_svg, panels, _lines)


def _draw(out_svg: Path, panels: dict[str, list[Row]], draw: Callable[[Any, Sequence[Row]], None]) -> None:
    """A panel per title, one below the other."""
    with figure(out_svg, 10, 3.2 * len(panels)) as drawn:
        axes = drawn.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            draw(axis, rows)
            axis.set_title(title)


def _lines(axis: Any, rows: Sequence[Row]) -> None:
    lines = {"sparse": ("sparse", "o-"), "dense": ("dense, the best way", "s-"), "srelu24": ("chosen", "k--")}
    for name, (label, style) in lines.items():
        points = [
            (int(row.shape.split("x")[0]), ratio) for row in rows if (ratio := over_compile(row, name)) is not None
        ]
        if points:
            axis.plot(*zip(*sorted(points), strict=True), style, label=label, markersize=4)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens")
    axis.set_ylabel("times as fast as torch.compile")
    axis.legend(fontsize=7)


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    peers = [peer for peer in PEERS if any(peer in row.speedup for row in rows)]
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        places = [place for place, row in enumerate(rows) if peer in row.speedup]
        bars = axis.bar(
            [place + (index - (len(peers) - 1) / 2) * width for place in places],
            [rows[place].speedup[peer] for place in places],
            width,
            label=f"over {PEERS[peer]}",
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [row.shape for row in rows])
    axis.set_ylabel("times faster")
    axis.margins(y=0.12)
    axis.legend(fontsize=7, ncols=len(peers), loc="lower center")
