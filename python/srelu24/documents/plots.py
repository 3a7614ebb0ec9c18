"""Plots from result files, for the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from srelu24.bench.results import Row, load_results, of_op, of_recipes
from srelu24.documents.tables import PEERS, over_compile
from srelu24.figures import figure
from srelu24_gen.errors import RecordError


def plot_ffn(results_dir: Path, out_svg: Path) -> None:
    """Bars of the FFN's speed-up over each peer, one panel per GPU, type and density.

    Raises:
        RecordError: there is nothing to plot, or a file is no result file.
        Srelu24Error: matplotlib is not installed.
    """
    panels: dict[tuple[str, str, float], list[Row]] = {}
    for result in of_op(load_results(results_dir), "ffn_forward"):
        if result.row.speedup and result.row.recipe is None and not result.row.activation:
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


PAPER = {(8192, 32768): (1.23, 1.23, 1.30), (8192, 4096): (1.12, 1.13, 1.15)}
"""Speed-ups of the 8-bit FFN in arXiv 2503.16672 for these D and F at 2048, 4096 and 8192 tokens, on an H100."""
_PAPER_TOKENS = (2048, 4096, 8192)
_PARTS = ("linear1", "activation, scales, sparsify", "linear2")


def plot_recipes(results_dir: Path, out_svg: Path) -> None:
    """Where the time of 8-bit FFNs goes, in the bars of the paper's kernel figure; a panel per GPU, D and F.

    The two GEMMs were timed alone; what else the FFN took is the bar between them. A fused GEMM1 holds the activation
    and the pruning. Of several densities the smallest is drawn.

    Raises:
        RecordError: there is nothing to plot, or a file is no result file.
        Srelu24Error: matplotlib is not installed.
    """
    results = load_results(results_dir)
    recipes = of_recipes(results)
    if not recipes:
        raise RecordError(f"{results_dir} has no 8-bit FFN to plot; run `srelu24 bench fp8` first")
    density = min(result.row.density for result in recipes)
    panels: dict[str, list[Row]] = {}
    for result in results:
        if result.row.dtype.startswith("fp8") and result.row.density == density:
            d, f = result.row.shape.split("x")[1:]
            title = f"FFN in e4m3 on {result.gpu}, D = {d}, F = {f}, {density:.0%} non-zero activations"
            panels.setdefault(title, []).append(result.row)
    _draw(out_svg, panels, _parts)


def parts_of(rows: Sequence[Row]) -> dict[int, dict[str, tuple[float, float, float]]]:
    """Milliseconds of the three :data:`_PARTS` by tokens and way to compute an FFN, where all of them were measured."""
    found: dict[int, dict[str, tuple[float, float, float]]] = {}
    alone = {(row.shape, row.op, row.recipe): row.candidates for row in rows}

    def put(way: str, shape: str, whole: float | None, first: float | None, second: float | None) -> None:
        if whole and first and second:
            of_shape = found.setdefault(int(shape.split("x")[0]), {})
            of_shape[way] = (first, max(whole - first - second, 0.0), second)

    for row in rows:
        if row.op != "ffn_forward" or row.recipe is None:
            continue
        writes = "rowwise" if row.recipe == "rowwise" else "predicted"  # what GEMM1 writes: bf16, or e4m3
        first = alone.get((row.shape, "gemm_relu2_24", writes), {})
        second = alone.get((row.shape, "spgemm", None), {})
        for way, whole, gemm in (("torch.compile", "torch_compile", "cublas"), (row.recipe, "srelu24", "srelu24")):
            times = (row.candidates.get(whole), first.get(gemm), second.get(gemm))
            put(way, row.shape, *(candidate.ms if candidate else None for candidate in times))
    return found


def _parts(axis: Any, rows: Sequence[Row]) -> None:
    d, f = (int(size) for size in rows[0].shape.split("x")[1:])
    paper = dict(zip(_PAPER_TOKENS, PAPER.get((d, f), ()), strict=False))
    labels: list[str] = []
    place = 0
    for tokens, ways in sorted(parts_of(rows).items()):
        dense = sum(ways.get("torch.compile", ()))
        for way, parts in ways.items():
            for number, (name, height) in enumerate(zip(_PARTS, parts, strict=True)):
                bar = {"bottom": sum(parts[:number]), "color": f"C{number}", "label": "" if labels else name}
                axis.bar(place, height, 0.8, **bar)
            faster = f"{dense / sum(parts):.2f}x" if dense else ""
            axis.annotate(faster, (place, sum(parts)), ha="center", va="bottom", fontsize=7)
            note = f"\n{tokens} tokens" if way == "torch.compile" else ""
            note += f"\npaper {paper[tokens]:.2f}x" if way == "torch.compile" and tokens in paper else ""
            labels.append(way + note)
            place += 1
        labels.append("")  # a gap
        place += 1
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylabel("ms")
    axis.margins(y=0.12)
    axis.legend(fontsize=7)


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
