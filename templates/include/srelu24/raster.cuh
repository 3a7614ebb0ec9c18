// The order in which output tiles are worked on: bands along M, shared by all GEMM kernels.
#pragma once

#include <cutlass/fast_math.h>

#include <srelu24/packed.cuh>

namespace srelu24 {

/// The order of the output's tiles. The host has prepared the divisions (FastDivmod).
struct RasterParams {
  int32_t tiles, tiles_n;
  int32_t group;             // tiles walked along M before moving on along N: the height of a band
  int32_t full_bands;        // bands of that height; the last may be lower
  cutlass::FastDivmod band;  // group * tiles_n
  cutlass::FastDivmod height, last_height;
};

struct Tile {
  int m, n;  // in tiles of a CTA under mma.sync, of a cluster under wgmma
};

/// Walks `group` tiles along M, then one along N: neighbours share B tiles, and a band of A
/// stays in L2 while B streams past it. Every second band runs backwards along N, so that it starts
/// on the B tiles the last one ended on.
__device__ __forceinline__ Tile raster(RasterParams const& p, int index) {
  int band, in_band, m, n;
  p.band(band, in_band, index);
  (band < p.full_bands ? p.height : p.last_height)(n, m, in_band);
  return {band * p.group + m, band & 1 ? p.tiles_n - 1 - n : n};
}

}  // namespace srelu24
