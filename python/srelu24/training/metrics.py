"""What a recipe does to each layer: density, values dropped by pruning, dense features. A table and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from srelu24.figures import figure
from srelu24_gen.errors import Unsupported

if TYPE_CHECKING:
    from rich.table import Table


class Observation(NamedTuple):
    """One forward pass of a layer, not yet read from its device."""

    sums: Tensor
    """int64 [4]: non-zeros; those of dense features; kept along features; kept along tokens as well."""
    rows: int
    sizes: tuple[int, int]
    """Features, dense features."""


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """One layer, over the forward passes that were watched.

    Attributes:
        density: share of non-zero hidden activations, before pruning.
        dropped_features: share of the non-zeros that pruning along features dropped, or would drop during warm-up.
        dropped_tokens: share of the rest that pruning along tokens drops from the weight gradient of w2.
        dense_features: how many features are not pruned along tokens.
        dense_density: their density.
    """

    name: str
    density: float
    dropped_features: float
    dropped_tokens: float
    dense_features: int
    dense_density: float


@dataclass(slots=True)
class Metrics:
    """What :meth:`srelu24.Recipe.watch` collects. Reading it waits for the GPU."""

    observations: dict[str, list[Observation]] = field(default_factory=dict)

    def add(self, name: str, observation: Observation) -> None:
        """Take in one forward pass."""
        self.observations.setdefault(name, []).append(observation)

    @property
    def layers(self) -> list[LayerMetrics]:
        """One entry per layer, in the order of their first pass."""
        return [self[name] for name in self.observations]

    def __getitem__(self, name: str) -> LayerMetrics:
        """The layer of that name; of a converted model, its qualified name.

        Raises:
            Unsupported: no layer of that name ran.
        """
        if name not in self.observations:
            raise Unsupported(f"no layer {name!r} was watched; those that ran are {sorted(self.observations)}.")
        return _summarize(name, self.observations[name])

    def table(self) -> Table:
        """For ``rich.print``."""
        from rich.table import Table

        columns = (
            "layer",
            "density",
            "dropped along features",
            "dropped along tokens",
            "dense features",
            "their density",
        )
        table = Table(*columns)
        table.columns[0].no_wrap = True  # names are for looking up
        table.columns[0].overflow = "fold"
        for x in self.layers:
            shares = (f"{x.density:.2%}", f"{x.dropped_features:.2%}", f"{x.dropped_tokens:.2%}")
            table.add_row(x.name, *shares, str(x.dense_features), f"{x.dense_density:.2%}")
        return table

    def plot(self, path: Path) -> None:
        """A figure of density and dropped shares over the layers.

        Raises:
            Unsupported: nothing was watched.
            Srelu24Error: matplotlib is not installed, or the file cannot be written.
        """
        layers = self.layers
        if not layers:
            raise Unsupported("no forward pass was watched; run the model inside of recipe.watch().")
        with figure(path, 7, 4) as drawn:
            axes = drawn.subplots()
            for key, label in (
                ("density", "density"),
                ("dropped_features", "dropped along features"),
                ("dropped_tokens", "dropped along tokens"),
            ):
                axes.plot([x.name for x in layers], [100 * asdict(x)[key] for x in layers], marker="o", label=label)
            axes.set_ylabel("%")
            axes.tick_params(axis="x", rotation=45)
            axes.legend()


def _summarize(name: str, seen: list[Observation]) -> LayerMetrics:
    nonzeros, dense, kept, kept_both = sum(x.sums for x in seen).tolist()  # type: ignore[union-attr]
    rows = sum(x.rows for x in seen)
    f, n = seen[-1].sizes
    return LayerMetrics(
        name=name,
        density=_share(nonzeros, rows * f),
        dropped_features=_share(nonzeros - kept, nonzeros),
        dropped_tokens=_share(kept - kept_both, kept),
        dense_features=n,
        dense_density=_share(dense, rows * n),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
