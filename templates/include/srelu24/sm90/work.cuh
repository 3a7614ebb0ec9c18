// What a cluster works on: whole tiles in bands along M, then, with stream-K, its share of the last wave.
#pragma once

#include <srelu24/metadata.cuh>
#include <srelu24/sm90/params.cuh>

namespace srelu24 {

/// A tile, or with stream-K a piece of one along K, in k-blocks. An empty one means that there is no more work.
struct Work {
  Tile tile;
  int k_begin, k_end;

  __device__ __forceinline__ bool exists() const { return k_begin < k_end; }
};

/// First unit of the split tiles that `cluster` takes.
__device__ __forceinline__ int first_unit(SplitParams const& p, int cluster) {
  return cluster * p.units + min(cluster, p.extra);
}

/// k-blocks that a vector of E feeds, 256 of K: the unit in which tiles are split, whether A is sparse or not.
template <class Config>
inline constexpr int kVectorBlocks = MetadataLayout::kVectorColumns / Config::kTileK;

/// The work at `index`. A cluster walks cluster, cluster + clusters, ...: first whole tiles; then, with
/// stream-K, its even share of the remaining tiles' K: less than two tiles, so it lies in up to three. The
/// piece in the latest tile comes first (stream_k.cuh says why).
template <class Config>
__device__ __forceinline__ Work work_at(GemmParams const& p, int index) {
  if (!Config::kStreamK || index < p.split.first_tile) {
    return {raster(p.raster, index), 0, index < p.raster.tiles ? p.k_blocks : 0};
  }
  constexpr int kUnit = kVectorBlocks<Config>;
  int const clusters = gridDim.x / Config::kClusterM, cluster = blockIdx.x / Config::kClusterM;
  int const begin = first_unit(p.split, cluster), end = first_unit(p.split, cluster + 1);
  int tile, unit;  // the last unit's tile, and the unit in it
  p.split.tile_units(tile, unit, end - 1);
  // A cluster comes here with first_tile + cluster, then `clusters` more each time: `back` counts tiles from the
  // latest.
  int const number = index - p.split.first_tile;
  int const back = (number >= clusters) + (number >= 2 * clusters) + (number >= 3 * clusters);
  int const tile_begin = end - 1 - unit - back * p.split.tile_units.divisor;
  int const k_begin = (max(begin, tile_begin) - tile_begin) * kUnit;
  int const k_end = min((end - tile_begin) * kUnit, p.k_blocks);
  return {raster(p.raster, p.split.first_tile + tile - back), k_begin, begin < end ? k_end : 0};
}

/// The part of a work that one consumer warpgroup does.
struct alignas(16) Piece {
  int row, column;     // first of the warpgroup's rows, first column of the tile
  int k_begin, k_end;  // in k-blocks

  __device__ __forceinline__ bool exists() const { return k_begin < k_end; }
};

/// A piece and the one after it.
struct Pieces {
  Piece now, next;
  int number;  // of the work that is now

  /// Begin work `w`; `after` comes after what is next so far.
  __device__ __forceinline__ void advance(int w, Piece const& after) {
    now = next;
    next = after;
    number = w;
  }
};

/// The same, kept in shared memory, once for each warp: most mainloops have no registers for it, and to work pieces out
/// again afterwards would take more registers than the accumulators leave.
struct SharedPieces {
  Piece now, next;
  int number;

  __device__ __forceinline__ void advance(int w, Piece const& after) {
    Piece const current = next;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      now = current;
      next = after;
      number = w;
    }
    __syncwarp();
  }
};

}  // namespace srelu24
