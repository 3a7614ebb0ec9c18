"""Table and plot of an ablation's file."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

from srelu24.bench.ablation.results import AblationFile, Grouping, Run, Variant
from srelu24.documents.tables import markdown_table
from srelu24.figures import figure
from srelu24_gen.errors import RecordError


def plot(file: AblationFile, out_svg: Path) -> None:
    """Training loss over the steps of the seeds that all variants have, validation loss at the end with every seed, and
    what groupings drop.

    Raises:
        RecordError: no run is in the file.
        Srelu24Error: matplotlib is not installed.
    """
    runs = _by_variant(file)
    if not runs:
        raise RecordError("the ablation has no runs to plot; run `srelu24 bench training` first")
    shared = set.intersection(*({run.seed for run in of_variant} for of_variant in runs.values()))
    with figure(out_svg, 12, 3.6) as drawn:
        curves, finals, groups = drawn.subplots(1, 3)
        for index, (variant, of_variant) in enumerate(runs.items()):
            drawn_runs = [run for run in of_variant if run.seed in shared] or of_variant
            steps = [step for step, _ in min((run.losses for run in drawn_runs), key=len)]
            losses = [mean(run.losses[i][1] for run in drawn_runs) for i in range(len(steps))]
            curves.plot(steps, losses, label=variant.value, linewidth=1)
            seeds = [run.final_loss for run in of_variant if run.final_loss is not None]
            finals.plot([index] * len(seeds), seeds, "o", markersize=4)
        curves.set_xlabel("step")
        curves.set_ylabel("training loss, nats per byte")
        curves.set_yscale("log")
        curves.legend(fontsize=7)
        finals.set_ylabel("validation loss, every seed")
        finals.set_xticks(range(len(runs)), [variant.value for variant in runs], rotation=30, ha="right")
        _plot_groups(groups, file.groupings)


def losses_table(file: AblationFile) -> str:
    """A variant of the method per row: the validation loss it reaches, beside that of the dense runs."""
    runs = _by_variant(file)
    if not runs:
        return ""
    dense = {run.seed: run.final_loss for run in runs.get(Variant.DENSE, [])}
    columns = ["variant", "seeds", "validation loss", "lowest .. highest", "over dense", "density", "ms per step"]
    rows = []
    for variant, of_variant in runs.items():
        finals = _finals(of_variant)
        diverged = len(of_variant) - len(finals)
        cells = [variant.value, str(len(of_variant)) + (f", {diverged} diverged" if diverged else "")]
        if finals:
            cells += [f"{mean(finals):.4f}", f"{min(finals):.4f} .. {max(finals):.4f}"]
        else:
            cells += ["-", "-"]
        over = [
            run.final_loss - other
            for run in of_variant
            if run.final_loss is not None and (other := dense.get(run.seed)) is not None
        ]
        cells.append(f"{mean(over):+.4f}" if over else "-")
        cells.append(f"{mean(density for run in of_variant for density in run.densities):.1%}")
        cells.append(f"{median(run.ms_per_step for run in of_variant):.1f}")
        rows.append(cells)
    s, env = file.setup, file.env
    parameters = file.runs[0].parameters / 1e6
    commits = " and ".join(dict.fromkeys(run.commit[:10] for run in file.runs if run.commit))
    head = (
        f"{env.get('gpu') or 'CPU'}, PyTorch {env.get('torch')}, "
        f"{f'commit {commits}, ' if commits else ''}{str(env.get('date'))[:10]}: {parameters:.1f} M "
        f"parameters, {s.layers} layers of {s.width} and {s.hidden}, {s.steps} steps of {s.tokens} bytes, "
        f"{s.warmup_steps} dense ones in the warm-up, {file.corpus_bytes / 1e6:.0f} MB of text:"
    )
    return f"{head}\n\n{markdown_table(columns, rows)}\n"


def agreement_table(file: AblationFile) -> str:
    """Training losses of the recipe on the kernels and on the reference, by seed: at quarters of the steps."""
    runs = _by_variant(file)
    kernels, reference = (
        {run.seed: dict(run.losses) for run in runs.get(v, [])} for v in (Variant.RECIPE, Variant.REFERENCE)
    )
    seeds = sorted(kernels.keys() & reference.keys())
    steps = sorted(set.intersection(*(set(kernels[seed]) & set(reference[seed]) for seed in seeds))) if seeds else []
    if not steps:
        return ""
    head = ["step", *(f"seed {seed}: kernels, reference" for seed in seeds), "mean difference", "spread of the seeds"]
    rows = []
    for step in dict.fromkeys(steps[(quarter * len(steps) - 1) // 4] for quarter in range(1, 5)):
        pairs = [(kernels[seed][step], reference[seed][step]) for seed in seeds]
        spread = max(loss for _, loss in pairs) - min(loss for _, loss in pairs)
        rows.append(
            [
                str(step),
                *(f"{ours:.4f}, {theirs:.4f}" for ours, theirs in pairs),
                f"{mean(ours - theirs for ours, theirs in pairs):+.4f}",
                f"{spread:.4f}",
            ]
        )
    return markdown_table(head, rows) + "\n"


def groups_table(file: AblationFile) -> str:
    """Shares of non-zeros that groups along tokens drop, by the stride of the groups."""
    groupings = file.groupings
    if not groupings:
        return ""
    layers = sorted({g.layer for g in groupings})
    head = ["stride", "all layers", "with dense features", *(f"layer {layer}" for layer in layers)]
    rows = []
    for stride, found in _by_stride(groupings).items():
        rows.append(
            [
                _stride_name(stride),
                f"{mean(g.dropped for g in found):.2%}",
                f"{mean(g.dropped_with_dense_features for g in found):.2%}",
                *(f"{mean(g.dropped for g in found if g.layer == layer):.2%}" for layer in layers),
            ]
        )
    return markdown_table(head, rows) + "\n"


def _plot_groups(axis: Any, groupings: list[Grouping]) -> None:
    by_stride = _by_stride(groupings)
    names = [_stride_name(stride) for stride in by_stride]
    axis.plot(names, [100 * mean(g.dropped for g in found) for found in by_stride.values()], "o-", label="all features")
    split = [100 * mean(g.dropped_with_dense_features for g in found) for found in by_stride.values()]
    axis.plot(names, split, "s-", label="without the dense features")
    axis.set_xlabel("stride of the groups along tokens")
    axis.set_ylabel("non-zeros dropped, %")
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", rotation=30)
    axis.legend(fontsize=7)


def _by_variant(file: AblationFile) -> dict[Variant, list[Run]]:
    found = {variant: [run for run in file.runs if run.variant is variant] for variant in Variant}
    return {variant: runs for variant, runs in found.items() if runs}


def _by_stride(groupings: list[Grouping]) -> dict[int | None, list[Grouping]]:
    found: dict[int | None, list[Grouping]] = {}
    for grouping in groupings:
        found.setdefault(grouping.stride, []).append(grouping)
    return found


def _finals(runs: list[Run]) -> list[float]:
    return [run.final_loss for run in runs if run.final_loss is not None]


def _stride_name(stride: int | None) -> str:
    return {None: "widest", 0: "neighbours"}.get(stride, str(stride))
