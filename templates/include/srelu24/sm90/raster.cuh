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
__device__ __forceinline__ Tile raster(RasterParams const& p, int index) {
  int band, in_band, m, n;
  p.band(band, in_band, index);
  (band < p.full_bands ? p.height : p.last_height)(n, m, in_band);
  return {band * p.group + m, band & 1 ? p.tiles_n - 1 - n : n};
}

}  // namespace srelu24
