"""Recipe: when a model trains dense and when sparse, and which features of each layer are not pruned along tokens.

What it holds are tensors that are changed in place, so compiled code and captured graphs go on reading them: an
on-device ranking per layer, and one flag on the host that the operator reads when it runs, not when it is traced.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srelu24.runtime.operands import check_tensor
from srelu24.training.metrics import Metrics, Observation
from srelu24.training.order import check_stride
from srelu24_gen.errors import Unsupported

DENSE_TILE = 64
"""Dense features come in whole tiles: the 64 rows that one warpgroup multiplies."""


class Recipe:
    """The method of arXiv 2503.16672, for every squared-ReLU FFN of a model.

    Dense for ``warmup_steps`` steps, sparse afterwards. Give each layer a :meth:`layer`, hand that to
    ``srelu24.ffn(..., recipe=...)``, and call :meth:`step` once after every optimizer step:

        recipe = srelu24.Recipe()
        layer = recipe.layer("blocks.0", w1)
        y = srelu24.ffn(x, w1, w2, recipe=layer)
        y.sum().backward()
        optimizer.step()
        recipe.step()

    Args:
        warmup_steps: dense steps; 0 is sparse from the start.
        dense_features: share of the features, the densest, that weight gradients take unpruned along tokens; rounded
            up to whole tiles of 64.
        token_stride: tokens between the rows of a group along tokens. None spreads each over the whole batch, 1 takes
            the kernels' own groups of 16 neighbours, 0 groups neighbours and is only there to compare with.
        refresh: steps from one ranking of the features by density to the next.
        kernels: run the steps on the sparse training kernels, where they take them. Without them a step on a GPU is
            the reference in plain PyTorch: the same numbers, slower than dense.

    Raises:
        Unsupported: a value is out of range.
    """

    def __init__(
        self,
        warmup_steps: int = 1000,
        dense_features: float = 0.05,
        token_stride: int | None = None,
        refresh: int = 100,
        kernels: bool = True,
    ) -> None:
        if not _is_count(warmup_steps) or warmup_steps < 0:
            raise Unsupported(f"warmup_steps is {warmup_steps!r}; a number of steps from 0 is needed.")
        if not _is_count(refresh) or refresh < 1:
            raise Unsupported(f"refresh is {refresh!r}; a number of steps from 1 is needed.")
        if not isinstance(dense_features, int | float) or not 0 <= dense_features <= 1:
            raise Unsupported(f"dense_features is {dense_features!r}; a share from 0 to 1 is needed.")
        check_stride(token_stride)
        if not isinstance(kernels, bool):
            raise Unsupported(f"kernels is {kernels!r}; True or False is needed.")
        self.warmup_steps = warmup_steps
        self.dense_features = dense_features
        self.token_stride = token_stride
        self.refresh = refresh
        self.kernels = kernels
        self.steps = 0
        """Steps taken."""
        self.metrics: Metrics | None = None
        """Where layers report to inside of :meth:`watch`."""
        self.layers: dict[str, LayerState] = {}
        # On the host: reading it does not wait for the GPU, and changing it does not change any code.
        self.sparse_flag = torch.tensor(warmup_steps == 0)

    def __getstate__(self) -> dict[str, Any]:
        # The flag follows from the step, and a spawned process would share its memory.
        return {name: value for name, value in self.__dict__.items() if name != "sparse_flag"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with torch.inference_mode(False):
            self.sparse_flag = torch.tensor(self.sparse, device="cpu")

    def __repr__(self) -> str:
        return (
            f"Recipe(warmup_steps={self.warmup_steps}, dense_features={self.dense_features}, "
            f"token_stride={self.token_stride}, refresh={self.refresh}): {self.steps} steps, "
            f"{'sparse' if self.sparse else 'dense'}, {len(self.layers)} layers"
        )

    @property
    def sparse(self) -> bool:
        """Whether the next forward pass is sparse."""
        return self.steps >= self.warmup_steps

    def layer(self, name: str, w1: Tensor) -> LayerState:
        """The state of a new layer, on the device of its first weight ``w1`` [F, D].

        Raises:
            Unsupported: F is not a multiple of 8, w1 is no tensor, or the name is no string or taken.
        """
        if not isinstance(name, str):
            raise Unsupported(f"the name of a layer is {name!r}; a string is needed.")
        check_tensor("w1", w1)
        if name in self.layers:
            raise Unsupported(f"the recipe has a layer {name!r} already; give every layer a name of its own.")
        if w1.dim() != 2 or w1.shape[0] < 8 or w1.shape[0] % 8:
            raise Unsupported(f"w1 has shape {list(w1.shape)}; [F, D] with F a multiple of 8 is needed to prune.")
        f = w1.shape[0]
        tiles = -(-round(f * self.dense_features) // DENSE_TILE)
        state = LayerState(
            recipe=self,
            name=name,
            counts=torch.zeros(f, dtype=torch.int64, device=w1.device),
            rows=torch.zeros((), dtype=torch.int64, device=w1.device),
            dense_features=torch.arange(min(f, tiles * DENSE_TILE), device=w1.device),
            steps=torch.full((), self.steps, dtype=torch.int64, device=w1.device),
        )
        self.layers[name] = state
        return state

    def free_name(self) -> str:
        """A name that no layer has: the first free number."""
        return next(str(n) for n in itertools.count() if str(n) not in self.layers)

    def step(self) -> bool:
        """Count an optimizer step, and rank the features when a ranking is due. Does not wait for the GPU.

        Call it when the backward passes of the step are done: autograd refuses one whose forward saw another state.

        Returns:
            Whether the warm-up ended with this step. A CUDA graph that was captured before stays dense, so
            capture it again then; eager and compiled code switch by themselves.
        """
        was_sparse = self.sparse
        self.steps += 1
        for state in self.layers.values():
            state.note_step()
        ends = self.sparse and not was_sparse
        if ends or self.steps % self.refresh == 0:
            for state in self.layers.values():
                state.rank()
        if ends:
            self.sparse_flag.fill_(True)
        return ends

    @contextmanager
    def watch(self) -> Iterator[Metrics]:
        """Measure every forward pass inside: how dense each layer is and what pruning drops.

        It costs passes over the hidden activations, and compiled code is compiled once more. Reading the metrics waits
        for the GPU; measuring does not.
        """
        before, self.metrics = self.metrics, Metrics()
        try:
            yield self.metrics
        finally:
            self.metrics = before

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the step, and every layer's ranking and counts."""
        layers = {name: dict(zip(_TENSORS, state.tensors, strict=True)) for name, state in self.layers.items()}
        return {"steps": self.steps, "layers": layers}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, into layers of the same names and widths; in place.

        Raises:
            Unsupported: not a recipe's state, other layers, or a tensor of another size; nothing is changed then.
        """
        steps, layers = _read_state(saved)
        if set(layers) != set(self.layers):
            raise Unsupported(
                f"the saved recipe has layers {sorted(layers)} and this one {sorted(self.layers)}; "
                "make the same layers before loading."
            )
        pairs = [
            (f"{layer}.{name}", mine, layers[layer][name])
            for layer, state in self.layers.items()
            for name, mine in zip(_TENSORS, state.tensors, strict=True)
        ]
        for name, mine, theirs in pairs:
            if mine.shape != theirs.shape:
                raise Unsupported(
                    f"the saved {name} has shape {list(theirs.shape)} and this recipe's {list(mine.shape)}; "
                    "widths and dense_features must be those it was saved with."
                )
        for _, mine, theirs in pairs:
            mine.copy_(theirs)
        self.resume(steps)
        for state in self.layers.values():
            state.note_step()

    def resume(self, steps: int) -> None:
        """Go on as after so many steps."""
        self.steps = steps
        self.sparse_flag.fill_(self.sparse)


_TENSORS = ("counts", "rows", "dense_features")


@dataclass(eq=False, slots=True, repr=False)
class LayerState:
    """One layer's part of a recipe; made by :meth:`Recipe.layer`. Its tensors are changed in place, and replaced only
    when the layer moves to another device.

    Attributes:
        counts: int64 [F], non-zeros of every feature since the last ranking; activation checkpointing counts a pass
            twice, here and in ``rows``.
        rows: int64 [], the tokens they were counted over.
        dense_features: int64 [n], ascending.
        steps: int64 [], the recipe's step for those that keep or copy the layer's tensors.
        w1_grad, w2_grad: see :meth:`accumulate_into`.
    """

    recipe: Recipe
    name: str
    counts: Tensor
    rows: Tensor
    dense_features: Tensor
    steps: Tensor
    w1_grad: Tensor | None = None
    w2_grad: Tensor | None = None
    steps_seen: int | None = None
    """Version of ``steps`` that the recipe knows; None where it has to look."""

    def __repr__(self) -> str:
        return f"LayerState({self.name!r}, F = {len(self.counts)}, of {self.recipe!r})"

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.counts, self.rows, self.dense_features

    def note_step(self) -> None:
        """Write the recipe's step into the layer's tensor. Does not wait for the GPU."""
        self.steps.fill_(self.recipe.steps)
        self.steps_seen = None if self.steps.is_inference() else self.steps._version

    def follow(self) -> None:
        """Take over the step where somebody else has written it: waits for the GPU then, and only then."""
        if self.steps.is_meta or self.steps.is_inference() or self.steps_seen == self.steps._version:
            return
        self.steps_seen = self.steps._version
        if (steps := int(self.steps)) != self.recipe.steps:
            self.recipe.resume(steps)

    def leave(self) -> None:
        """Take the layer out of its recipe; the name is free again."""
        del self.recipe.layers[self.name]

    def to(self, device: torch.device) -> None:
        """Move to where the layer's weights are now. The counts and the ranking of a layer on the "meta" device have no
        values; after a move from there they are as in a new layer.

        Raises:
            Unsupported: gradients are accumulated into buffers, which stay where they are.
        """
        before = self.counts.device
        if device == before:
            return
        if self.w1_grad is not None:
            raise Unsupported(
                f"layer {self.name!r} accumulates into buffers on {before} and its weights went to {device}; "
                "call accumulate_into(None, None) before moving them."
            )
        if before.type == "meta":
            self.counts = torch.zeros_like(self.counts, device=device)
            self.rows = torch.zeros_like(self.rows, device=device)
            self.dense_features = torch.arange(len(self.dense_features), device=device)
            self.steps = torch.full_like(self.steps, self.recipe.steps, device=device)
        else:
            self.counts, self.rows, self.dense_features = (tensor.to(device) for tensor in self.tensors)
            self.steps = self.steps.to(device)
        self.steps_seen = None

    def accumulate_into(self, w1_grad: Tensor | None, w2_grad: Tensor | None) -> None:
        """Have backward passes add the weight gradients to these, unrounded, instead of returning them to autograd.

        For gradient accumulation: fp32 buffers keep what a ``.grad`` in the weights' type would round away in every
        micro-batch. ``w.grad`` then stays None; give the optimizer the buffer when the step is due. None, None ends it.

        Args:
            w1_grad: [F, D]. w2_grad: [D, F]. Both or neither; float32 or the weights' type, on their device.

        Raises:
            Unsupported: one of the two is missing, not of this layer's width, or requires a gradient itself.
        """
        if (w1_grad is None) != (w2_grad is None):
            raise Unsupported("one gradient buffer was given; give those of both weights, or None for both.")
        if w1_grad is not None and w2_grad is not None:
            check_tensor("w1_grad", w1_grad)
            check_tensor("w2_grad", w2_grad)
            f = len(self.counts)
            if w1_grad.dim() != 2 or w1_grad.shape[0] != f or w2_grad.shape != (w1_grad.shape[1], f):
                raise Unsupported(
                    f"gradient buffers have shapes {list(w1_grad.shape)} and {list(w2_grad.shape)}; "
                    f"[F, D] and [D, F] with F = {f} are needed."
                )
            if w1_grad.requires_grad or w2_grad.requires_grad:
                raise Unsupported("a gradient buffer requires a gradient itself; give plain tensors.")
        self.w1_grad, self.w2_grad = w1_grad, w2_grad

    def count(self, counts: Tensor, rows: int) -> None:
        """Add a forward pass: non-zeros of every feature, and how many tokens it had."""
        self.counts += counts
        self.rows += rows

    def rank(self) -> None:
        """Make the densest features the dense ones and count from zero. Stays on the device."""
        densest = torch.argsort(self.counts, descending=True, stable=True)[: len(self.dense_features)]
        self.dense_features.copy_(densest.sort().values)
        self.counts.zero_()
        self.rows.zero_()

    def observe(self, counts: Tensor, kept: Tensor, rows: int) -> None:
        """Report a forward pass to the metrics of :meth:`Recipe.watch`."""
        assert self.recipe.metrics is not None
        dense = counts[self.dense_features].sum()
        self.recipe.metrics.add(
            self.name, Observation(torch.cat((counts.sum().view(1), dense.view(1), kept)), rows, self.sizes)
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Features, and how many of them are dense."""
        return len(self.counts), len(self.dense_features)


def _read_state(saved: Mapping[str, Any]) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """The step and the layers of a saved state.

    Raises:
        Unsupported: it is not the state of a recipe.
    """
    try:
        steps = saved["steps"]
        layers = {layer: {name: state[name] for name in _TENSORS} for layer, state in saved["layers"].items()}
    except (AttributeError, KeyError, TypeError):
        steps, layers = None, {}
    tensors = [tensor for state in layers.values() for tensor in state.values()]
    if not _is_count(steps) or steps < 0 or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise Unsupported("what is loaded is not the state of a recipe; give what Recipe.state_dict() returned.")
    return steps, layers


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
