// The GEMM kernels on mma.sync and mma.sp: a CTA computes one tile, from cp.async to epilogue.
//
// Config (bound by the template) names the element type, the tile, the warps, the load order and the epilogue. All warps
// load and all multiply; each owns kWarpM x kWarpN of the tile in its registers. They run on every GPU from Ampere on.
#pragma once

#include <srelu24/epilogue.cuh>
#include <srelu24/sm80/mainloop.cuh>

namespace srelu24 {

/// The epilogue's view of a warp: its accumulators span kWarpN columns.
template <class Config>
struct OfWarp : Config {
  static constexpr int kTileN = Config::kWarpN;
};

template <class Config>
__device__ __forceinline__ void gemm(GemmParams const& p) {
  extern __shared__ __align__(128) uint8_t ring[];
  static_assert(Config::kStages * Mainloop<Config>::kStageBytes <= Config::kSharedBytes, "more than the host gives");
  static_assert(!Config::kPrune || Config::kWarpN % 64 == 0, "a thread writes whole words of E");
  using View = OfWarp<Config>;
  constexpr int kWarpsN = Config::kTileN / Config::kWarpN;

  Tile const tile = raster(p.raster, blockIdx.x);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Mainloop<Config> const mainloop{p,
                                  ring,
                                  tile.m * Config::kTileM,
                                  tile.n * Config::kTileN,
                                  warp / kWarpsN * Config::kWarpM,
                                  warp % kWarpsN * Config::kWarpN};
  auto position = [&](int strip) -> BlockPosition {
    int const row = mainloop.row + mainloop.warp_row + 16 * strip;
    return {row + lane / 4, mainloop.column + mainloop.warp_column, row / 64, row % 64 / 16 * 32 + lane};
  };

  typename Mainloop<Config>::Accumulators accumulators;
#pragma unroll
  for (int s = 0; s < Mainloop<Config>::kStrips; ++s) initialize<View>(accumulators[s], p, position(s), true);
  mainloop.run(accumulators);
#pragma unroll
  for (int s = 0; s < Mainloop<Config>::kStrips; ++s) {
    BlockPosition const at = position(s);
    if (64 * at.block >= p.m) continue;  // no row of this block of E is there
    if constexpr (Config::kPrune) {
      store_pruned<View>(accumulators[s], p, at);
    } else {
      store_dense<View>(accumulators[s], p, at, {p, at});
    }
  }
}

}  // namespace srelu24
