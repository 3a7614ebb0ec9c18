"""How the clusters of a GEMM share its output tiles: what is launched, and what the cost model counts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from srelu24_gen.bindings import E_VECTOR_COLUMNS
from srelu24_gen.spec import KernelConfig

_CACHED_PLANS = 4096
_MANY_PIECES = 3
"""Left-over tiles that would be cut into so many or more are split together with the last whole wave: a tile's owner
adds the other pieces one after the other, so many thin pieces cost more time than they save."""


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """How the clusters share the output tiles: RasterParams and SplitParams of ``params.cuh``."""

    tiles_m: int
    """Cluster tiles along M."""
    tiles_n: int
    group: int
    """Cluster tiles walked along M before moving on along N."""
    clusters: int
    """Clusters launched; each has work."""
    k_blocks: int
    first_tile: int
    """Tiles from here on are split along K; ``tiles`` when none are."""
    tile_units: int
    """Units of 256 of K, a vector of E, in a tile."""
    units: int
    """Units of the split tiles that every cluster takes..."""
    extra: int
    """...and the first ``extra`` clusters one more."""

    @property
    def tiles(self) -> int:
        return self.tiles_m * self.tiles_n

    @property
    def split(self) -> int:
        """Tiles that are split along K."""
        return self.tiles - self.first_tile

    @property
    def cuts(self) -> bool:
        """Whether a share of the split tiles ends inside one, so that sums have to be added."""
        ends_whole = not self.extra and self.units % self.tile_units == 0
        return self.split > 0 and self.tile_units > 1 and not ends_whole


@functools.lru_cache(maxsize=_CACHED_PLANS)
def plan_work(config: KernelConfig, m: int, n: int, k: int, sm_count: int) -> WorkPlan:
    """Share [m, n] over the multiprocessors. Whole waves of tiles stay whole; with ``stream_k`` the rest is split,
    and the last whole wave with it where the rest is few tiles."""
    tiles_m, tiles_n = -(-m // (config.tile_m * config.cluster_m)), -(-n // config.tile_n)
    tiles, most = tiles_m * tiles_n, sm_count // config.cluster_m
    k_blocks = -(-k // config.tile_k)
    tile_units = -(-k // E_VECTOR_COLUMNS)
    split = tiles % most if config.stream_k else 0
    if 0 < split == tiles:  # no whole wave: a tile is not cut finer than pays, and every cluster has a unit
        most = min(most, tiles * max(1, math.isqrt(tile_units)))
    elif 0 < split * _MANY_PIECES <= most:
        split += most
    units, extra = divmod(split * tile_units, most)
    return WorkPlan(
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        group=min(config.raster_group, tiles_m),
        clusters=most if split else min(most, tiles),
        k_blocks=k_blocks,
        first_tile=tiles - split,
        tile_units=tile_units,
        units=units,
        extra=extra,
    )
