// Which output tile a cluster works on: a persistent walk in bands along M.
#pragma once

#include <srelu24/sm90/params.cuh>

namespace srelu24 {

struct Tile {
  int m, n;  // in cluster tiles
};

/// Walks `group` tiles along M, then one along N: neighbouring clusters share B tiles, and a band of A
/// stays in L2 while B streams past it. Every second band runs backwards along N, so that it starts
/// on the B tiles the last one ended on.
struct Raster {
  int tiles_m, tiles_n, group;

  __device__ __forceinline__ int tiles() const { return tiles_m * tiles_n; }

  __device__ __forceinline__ Tile operator()(int index) const {
    int const band_tiles = group * tiles_n;
    int const band = index / band_tiles;
    int const first_m = band * group;
    int const height = min(tiles_m - first_m, group);
    int const in_band = index - band * band_tiles;
    int const n = in_band / height;
    int const m = first_m + in_band - n * height;
    return {m, band & 1 ? tiles_n - 1 - n : n};
  }
};

__device__ __forceinline__ int ceil_div(int extent, int tile) { return (extent + tile - 1) / tile; }

template <class Config>
__device__ __forceinline__ Raster raster_of(GemmParams const& p) {
  return {ceil_div(p.m, Config::kTileM * Config::kClusterM), ceil_div(p.n, Config::kTileN), p.raster_group};
}

template <class Config>
__device__ __forceinline__ int k_blocks_of(GemmParams const& p) {
  return ceil_div(p.k, Config::kTileK);
}

}  // namespace srelu24
