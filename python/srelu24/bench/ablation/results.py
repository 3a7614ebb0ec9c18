"""The file of an ablation: ``docs/results/<gpu>/training_ablation.json``."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from srelu24.bench.results import ResultFile


class Variant(StrEnum):
    """One way to train."""

    DENSE = "dense"
    RECIPE = "recipe"
    REFERENCE = "recipe, reference"
    """The same on the reference in plain PyTorch, to hold the kernels against."""
    NO_WARMUP = "no warm-up"
    NAIVE_BACKWARD = "naive backward"
    """No dense features: all of them are pruned along tokens."""
    NO_PERMUTATION = "no token permutation"
    """Neighbours in the text are grouped along tokens."""
    NO_MASK_REUSE = "no mask reuse"
    """Each operand of the backward pass is pruned on its own, from what the forward pass had before pruning."""


class Setup(Struct, kw_only=True, frozen=True):
    """Everything that is the same in all runs of a file."""

    layers: int = 6
    width: int = 384
    hidden: int = 1536
    heads: int = 6
    context: int = 512
    batch: int = 32
    """Pieces of ``context`` bytes in a step."""
    steps: int = 2000
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    """Dense steps of the recipe."""
    refresh: int = 50
    validation_batches: int = 16

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.context


class Run(Struct, kw_only=True):
    """One model trained."""

    variant: Variant
    seed: int
    parameters: int
    losses: list[tuple[int, float]]
    """Step, and the mean training loss since the last entry, in nats per byte."""
    final_loss: float | None
    """On validation text; None where the run diverged."""
    diverged_at: int | None = None
    """Step at which the loss was no longer finite."""
    ms_per_step: float
    """Wall clock, median over the steps after the warm-up."""
    densities: list[float]
    """Non-zero share of every layer's hidden activations on validation text."""
    commit: str | None = None
    """That ran it: a file may be filled over several versions."""


class Grouping(Struct, kw_only=True):
    """What pruning along tokens drops in one layer of the dense model, by the stride of its groups."""

    seed: int
    layer: int
    stride: int | None
    """As in Recipe; None is the widest."""
    dropped: float
    """Share of the non-zeros left by pruning along features."""
    dropped_with_dense_features: float
    """The same with the densest 5 % exempt."""


class AblationFile(ResultFile, kw_only=True):
    """All runs of one setup on one machine."""

    kind: str = "training_ablation"
    setup: Setup
    corpus_bytes: int
    corpus_digest: str
    runs: list[Run]
    groupings: list[Grouping]
