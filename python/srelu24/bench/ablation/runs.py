"""Trains the variants, one after another, and keeps every finished run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from srelu24.bench.ablation import corpus as corpora
from srelu24.bench.ablation.corpus import Corpus
from srelu24.bench.ablation.model import Transformer
from srelu24.bench.ablation.results import AblationFile, Grouping, Run, Setup, Variant
from srelu24.bench.ablation.variants import attach
from srelu24.bench.results import check_writable
from srelu24.measuring.machine import environment
from srelu24.training import reference
from srelu24.training.order import NATURAL, NEIGHBOURS
from srelu24.training.reference import Pruning
from srelu24_gen.errors import RecordError, Unsupported

STRIDES = (NEIGHBOURS, NATURAL, 4, 16, 64, 256, None)
"""Groupings along tokens that are compared."""
_EVERY = 10
"""Steps between two readings of loss and clock."""
_DENSE_SHARE = 0.05


def ablate(
    setup: Setup,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    *,
    path: Path,
    device: torch.device | str,
    corpus: Corpus | None = None,
    seconds: float | None = None,
    on_event: Callable[[str], None] = lambda text: None,
) -> AblationFile:
    """Train what ``path`` does not hold yet, all variants of a seed before the next seed; saved after every run.

    Args:
        seconds: start no run that would not be done by then, going by the longest so far.
        on_event: called with one line for what happens.

    Raises:
        RecordError: the file is of another setup, corpus or GPU, or cannot be written.
        Unsupported: the setup makes no sense.
    """
    begin, longest = time.monotonic(), 0.0
    device = torch.device(device)
    _check(setup, variants, seeds)
    check_writable(path)
    corpus = (corpora.load() if corpus is None else corpus).to(device)
    env = environment(device)
    file, commit = _open(path, setup, corpus, env), env["commit"]
    done = {(run.variant, run.seed) for run in file.runs}
    for seed in seeds:
        for variant in variants:
            if (variant, seed) in done:
                on_event(f"{variant}, seed {seed}: done before")
                continue
            started = time.monotonic()
            if seconds is not None and started - begin + longest > seconds:
                on_event(f"stopped before {variant}, seed {seed}: the next run would pass {seconds:g} s")
                return file
            run, groupings = train(setup, variant, seed, corpus, device)
            run.commit = commit
            file.runs.append(run)
            file.groupings += groupings
            file.save(path)
            longest = max(longest, time.monotonic() - started)
            result = f"diverged at step {run.diverged_at}" if run.final_loss is None else f"loss {run.final_loss:.4f}"
            on_event(f"{variant}, seed {seed}: {result}, {run.ms_per_step:.1f} ms per step")
    return file


def train(
    setup: Setup, variant: Variant, seed: int, corpus: Corpus, device: torch.device
) -> tuple[Run, list[Grouping]]:
    """One model from its start to its validation loss. Equal seeds begin with equal weights and see equal text."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Transformer(
        layers=setup.layers, width=setup.width, hidden=setup.hidden, heads=setup.heads, context=setup.context
    ).to(device)
    recipe = attach(variant, model, warmup_steps=setup.warmup_steps, refresh=setup.refresh)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setup.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    losses: list[tuple[int, float]] = []
    times: list[float] = []
    total, since, clock = torch.zeros((), device=device), 0, time.perf_counter()
    diverged_at = None
    for step in range(1, setup.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate * _schedule(step, setup.steps)
        loss = _loss(model, corpora.batch(corpus.train, setup.batch, setup.context, random), device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if recipe is not None:
            recipe.step()
        total += loss.detach()
        since += 1
        if step % _EVERY == 0 or step == setup.steps:
            mean = total.item() / since  # waits for the GPU
            now = time.perf_counter()
            if step > setup.warmup_steps + _EVERY or not times:
                times.append((now - clock) * 1e3 / since)
            losses.append((step, mean))
            if not math.isfinite(mean):
                diverged_at = step
                break
            total.zero_()
            since, clock = 0, now
    final, densities, groupings = _validate(setup, model, seed, corpus, device)
    run = Run(
        variant=variant,
        seed=seed,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        losses=[(step, mean) for step, mean in losses if math.isfinite(mean)],
        final_loss=final if diverged_at is None and math.isfinite(final) else None,
        diverged_at=setup.steps if diverged_at is None and not math.isfinite(final) else diverged_at,
        ms_per_step=median(times),
        densities=densities,
    )
    return run, groupings if variant is Variant.DENSE and run.final_loss is not None else []


def _validate(
    setup: Setup, model: Transformer, seed: int, corpus: Corpus, device: torch.device
) -> tuple[float, list[float], list[Grouping]]:
    """Loss, density of every layer, and what groupings drop, on the same text for all."""
    random = torch.Generator().manual_seed(0)
    batches = [
        corpora.batch(corpus.validation, setup.batch, setup.context, random) for _ in range(setup.validation_batches)
    ]
    inputs: list[Tensor] = []
    hooks = [ffn.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach())) for ffn in model.ffns]
    with torch.no_grad():
        _loss(model, batches[0], device)
        for hook in hooks:
            hook.remove()
        loss = sum(_loss(model, tokens, device).item() for tokens in batches) / len(batches)
        densities, groupings = [], []
        for layer, (ffn, x) in enumerate(zip(model.ffns, inputs, strict=True)):
            hidden, dropped = _drops(x.flatten(0, -2), ffn.up.weight, ffn.down.weight)  # type: ignore[arg-type]
            densities.append((hidden != 0).double().mean().item())
            for stride, (plain, split) in dropped.items():
                groupings.append(
                    Grouping(seed=seed, layer=layer, stride=stride, dropped=plain, dropped_with_dense_features=split)
                )
    return loss, densities, groupings


def _drops(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, dict[int | None, tuple[float, float]]]:
    """relu2(Y1), and for every stride what pruning along tokens drops, without and with dense features."""
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    dense = reference.forward(x.to(w1.dtype), w1, w2, pruning=None, accumulate=None)
    count = math.ceil(_DENSE_SHARE * w1.shape[0])
    densest = dense.counts.argsort(descending=True)[:count]
    s = torch.where(reference.kept_along_features(dense.hidden), dense.hidden, 0.0)
    found = {}
    for stride in STRIDES:
        shares = []
        for exempt in (none, densest):
            kept = reference.kept_along_tokens(s, Pruning(exempt, stride))
            shares.append(1 - ((s != 0) & kept).sum().item() / max(1, (s != 0).sum().item()))
        found[stride] = (shares[0], shares[1])
    return dense.hidden, found


def _loss(model: Transformer, tokens: Tensor, device: torch.device) -> Tensor:
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        loss: Tensor = model(tokens)
    return loss


def _schedule(step: int, steps: int) -> float:
    """Up in the first twentieth, then down to a tenth along a cosine."""
    up = max(1, steps // 20)
    if step < up:
        return step / up
    return 0.55 + 0.45 * math.cos(math.pi * (step - up) / max(1, steps - up))


def _open(path: Path, setup: Setup, corpus: Corpus, env: dict[str, Any]) -> AblationFile:
    size = len(corpus.train) + len(corpus.validation)
    if not path.exists():
        return AblationFile(env=env, setup=setup, corpus_bytes=size, corpus_digest=corpus.digest, runs=[], groupings=[])
    file = AblationFile.load(path)
    for what, theirs, ours in (
        ("setup", file.setup, setup),
        ("corpus", file.corpus_digest, corpus.digest),
        ("GPU", file.env.get("gpu"), env["gpu"]),
    ):
        if theirs != ours:
            raise RecordError(f"{path} is of the {what} {theirs} and this is {ours}; name another file or remove it")
    return file


def _check(setup: Setup, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    if not variants or not seeds:
        raise Unsupported("an ablation needs at least one variant and one seed.")
    if setup.width % (2 * setup.heads) or setup.hidden % 8:
        raise Unsupported(
            f"width {setup.width}, {setup.heads} heads, hidden {setup.hidden}: the width must divide into heads of "
            "even size and the hidden width by 8."
        )
    if min(setup.steps, setup.batch, setup.context, setup.layers, setup.validation_batches) < 1:
        raise Unsupported("steps, batch, context, layers and validation_batches must be at least 1.")
