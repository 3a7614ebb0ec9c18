"""Trains a small byte-level GPT with squared-ReLU FFNs twice, side by side: dense, and by the sparse recipe.

    python examples/train_gpt.py                       # on a GPU: blocks as large as nanochat's d20; else tiny
    python examples/train_gpt.py --layers 12 --width 768 --steps 2000

Both begin with the same weights and see the same text: source code and documentation found on this machine. The recipe
is dense during its warm-up, and sparse from then on. Losses and densities are drawn while it trains and kept in an SVG.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.live import Live
from torch import Tensor

import srelu24
from srelu24.bench.ablation import corpus
from srelu24.bench.ablation.model import Transformer
from srelu24.cli import views
from srelu24.cli.table import Table
from srelu24.figures import figure

BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Curve:
    """What is known of one model: at every reading the step, the mean loss since the last one, and the density."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=20 if gpu else 2)
    parser.add_argument("--width", type=positive, default=1280 if gpu else 64, help="the hidden width is 4 times that")
    parser.add_argument("--heads", type=positive, default=10 if gpu else 2)
    parser.add_argument("--context", type=positive, default=2048 if gpu else 64)
    parser.add_argument("--batch", type=positive, default=8 if gpu else 4)
    parser.add_argument("--steps", type=positive, default=400 if gpu else 24)
    parser.add_argument("--warmup", type=int, default=100 if gpu else 12, help="dense steps of the recipe")
    parser.add_argument("--every", type=positive, default=10 if gpu else 4, help="steps between two readings")
    parser.add_argument("--plot", type=Path, default=Path("train_gpt.svg"))
    args = parser.parse_args()
    if args.warmup < 0:
        parser.error(f"--warmup is {args.warmup}; a number of steps from 0 is needed")
    if args.width % (2 * args.heads):
        parser.error(f"--width {args.width} and --heads {args.heads} do not fit; heads need the same even width")
    if args.every > args.steps:
        parser.error(f"--every {args.every} is more than --steps {args.steps}; nothing would be read")
    device = torch.device("cuda" if gpu else "cpu")

    text = corpus.load() if gpu else corpus.load(limit=1 << 20, roots=[Path(sysconfig.get_path("stdlib"))])
    text = text.to(device)
    sizes = {name: getattr(args, name) for name in ("layers", "width", "heads", "context")}
    torch.manual_seed(0)
    dense = Transformer(**sizes, hidden=4 * args.width).to(device)
    sparse = copy.deepcopy(dense)
    recipe = srelu24.Recipe(warmup_steps=args.warmup, refresh=max(1, args.warmup // 4))
    print(srelu24.convert(sparse, recipe=recipe))
    models = {"dense": dense, "sparse": sparse}
    curves = {name: Curve() for name in models}
    optimizers = {name: adamw(model) for name, model in models.items()}
    random = torch.Generator().manual_seed(0)

    totals = {name: torch.zeros((), device=device) for name in models}
    with Live(console=views.console(), refresh_per_second=4) as live:
        for step in range(1, args.steps + 1):
            tokens = corpus.batch(text.train, args.batch, args.context, random)
            for name, model in models.items():
                begin = now(device)
                loss = loss_of(model, tokens)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizers[name].param_groups:
                    group["lr"] = 2e-3 * min(1.0, step / (args.steps / 20), 2 * (1 - (step - 1) / args.steps))
                optimizers[name].step()
                optimizers[name].zero_grad()
                totals[name] += loss.detach()
                curves[name].seconds += now(device) - begin
            recipe.step()  # once for all layers, after every optimizer step
            if step % args.every == 0:
                readings = {
                    "dense": density_of_dense(dense, tokens),
                    "sparse": density_of_sparse(sparse, recipe, tokens),
                }
                for name, curve in curves.items():
                    curve.steps.append(step)
                    curve.losses.append(totals[name].item() / args.every)
                    curve.densities.append(readings[name])
                    totals[name].zero_()
                live.update(screen(curves, recipe, step, args.steps))

    print()
    # By layer, under the names that the layers have in the model.
    with recipe.watch() as metrics:
        loss_of(sparse, tokens)
    views.console().print(metrics.table())
    held_out = corpus.batch(text.validation, args.batch, args.context, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, model in models.items():
            ms = 1e3 * curves[name].seconds / args.steps
            print(f"{name}: {loss_of(model, held_out).item():.4f} nats per byte on other text, {ms:.1f} ms per step")
    if not gpu:
        print("without a GPU the recipe runs on its reference, which is there to be right, not fast")
    plot(args.plot, curves, args.warmup)
    print(f"plot: {args.plot}")


def positive(text: str) -> int:
    """An option's number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def adamw(model: Transformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    """Nats per byte."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        loss: Tensor = model(tokens)
    return loss


def now(device: torch.device) -> float:
    """The clock, once the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def density_of_dense(model: Transformer, tokens: Tensor) -> float:
    """Share of non-zero hidden activations, of a model that srelu24 has not touched."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        layers = srelu24.profile(model, tokens).layers
    return sum(layer.density for layer in layers) / len(layers)


def density_of_sparse(model: Transformer, recipe: srelu24.Recipe, tokens: Tensor) -> float:
    """The same from the recipe, which measures the forward passes that record gradients; they count for its ranking."""
    with recipe.watch() as metrics:
        loss_of(model, tokens)
    return sum(layer.density for layer in metrics.layers) / len(metrics.layers)


def screen(curves: dict[str, Curve], recipe: srelu24.Recipe, step: int, steps: int) -> Table:
    """What the terminal shows."""
    phase = "sparse" if recipe.sparse else "warm-up, dense"
    columns = ("", "loss", "", "density", "", "ms per step")
    table = Table(f"step {step} of {steps}; the recipe is {phase}", columns)
    for name, curve in curves.items():
        numbers = f"{curve.losses[-1]:.4f}", f"{curve.densities[-1]:.1%}"
        ms = f"{1e3 * curve.seconds / step:.1f}"
        table.add_row(name, numbers[0], bars(curve.losses), numbers[1], bars(curve.densities), ms)
    return table


def bars(values: list[float], width: int = 32) -> str:
    """A plot of one line: the last values between their extremes."""
    values = values[-width:]
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in values)


def plot(path: Path, curves: dict[str, Curve], warmup: int) -> None:
    """Loss and density over the steps."""
    with figure(path, 8, 3.5) as drawn:
        for axes, what in zip(drawn.subplots(1, 2), ("losses", "densities"), strict=True):
            for name, curve in curves.items():
                axes.plot(curve.steps, getattr(curve, what), label=name)
            axes.axvline(warmup, linestyle=":", color="grey", label="end of the warm-up")
            axes.set_xlabel("step")
        first, second = drawn.axes
        first.set_ylabel("loss, nats per byte")
        second.set_ylabel("share of non-zero activations")
        second.set_ylim(bottom=0)
        first.legend()


if __name__ == "__main__":
    main()
