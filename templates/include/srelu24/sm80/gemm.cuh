// The GEMM kernels on mma.sync and mma.sp: a CTA computes one tile, from cp.async to epilogue.
//
// Config (bound by the template) names the element type, the tile, the warps, the load order and the epilogue. All
// warps load and all multiply; each owns kWarpM x kWarpN of the tile in its registers. They run on every GPU from
// Ampere on.
#pragma once

#include <srelu24/epilogue_scaled.cuh>
#include <srelu24/sm80/mainloop.cuh>
#include <srelu24/sm80/split.cuh>

namespace srelu24 {

/// The epilogue's view of a warp: its accumulators span kWarpN columns.
template <class Config>
struct OfWarp : Config {
  static constexpr int kTileN = Config::kWarpN;
};

template <class Config>
__device__ __forceinline__ void gemm(GemmParams const& p) {
  extern __shared__ __align__(128) uint8_t ring[];
  static_assert(Config::kStages * Mainloop<Config>::kStageBytes <= Config::kSharedBytes,
                "the ring does not fit in the shared memory that the kernel is launched with");
  static_assert(!Config::kPrune || Config::kWarpN % MetadataLayout::kWordColumns == 0,
                "a thread writes whole words of E");
  static_assert(Config::kTileM % Config::kWarpM == 0 && Config::kTileN % Config::kWarpN == 0 &&
                    Config::kThreads == 32 * (Config::kTileM / Config::kWarpM) * (Config::kTileN / Config::kWarpN),
                "the warps of a CTA share its tile without a remainder");
  static_assert(Config::kStages >= 2, "copies are ahead of the MMAs by at least one k-block");
  using View = OfWarp<Config>;
  constexpr int kWarpsN = Config::kTileN / Config::kWarpN;

  // Which part of the tile is this warp's is computed before the mainloop and again after it, so that it takes no
  // registers in between.
  auto number = [&](int& slice) {  // of the tile, and the slice of its K
    int tile = unknown(blockIdx.x);
    if constexpr (Config::kStreamK) {
      p.split.slices(tile, slice, tile);
    }
    return tile;
  };
  auto part = [&]() -> Part {
    int slice = 0, k_begin = 0, k_end = p.k_blocks;
    Tile const tile = raster(p.raster, number(slice));
    if constexpr (Config::kStreamK) {
      constexpr int kUnit = MetadataLayout::kVectorColumns / Config::kTileK;
      k_begin = first_unit(p.split, slice) * kUnit;
      k_end = min(first_unit(p.split, slice + 1) * kUnit, p.k_blocks);
    }
    int const warp = unknown(threadIdx.x) / 32;
    return {tile.m * Config::kTileM,
            tile.n * Config::kTileN,
            warp / kWarpsN * Config::kWarpM,
            warp % kWarpsN * Config::kWarpN,
            k_begin,
            k_end};
  };
  auto position = [](Part const& at, int strip) -> BlockPosition {
    int const lane = threadIdx.x % 32, row = at.row + at.warp_row + 16 * strip;
    return {row + lane / 4, at.column + at.warp_column, row / 64, row % 64 / 16 * 32 + lane};
  };

  typename Mainloop<Config>::Accumulators accumulators;
  {
    Part const at = part();
    Mainloop<Config> mainloop(p, at, cute::cast_smem_ptr_to_uint(ring));
#pragma unroll
    for (int s = 0; s < Mainloop<Config>::kStrips; ++s) {
      initialize<View>(accumulators[s], p, position(at, s), at.k_begin == 0);
    }
    mainloop.run(accumulators);
  }
  if constexpr (Config::kStreamK) {
    int slice, tile = number(slice);
    if (!reduce<Config::kThreads>(accumulators, p.split, tile, slice)) return;
  }
  Part const mine = part();
#pragma unroll
  for (int s = 0; s < Mainloop<Config>::kStrips; ++s) {
    BlockPosition const at = position(mine, s);
    if (64 * at.block >= p.m) continue;  // no row of this block of E is inside of the matrix
    if constexpr (Config::kPrune && Config::kScaled) {
      float s_inverse[2] = {};
      if constexpr (kStoresE4m3<View>) load_of_rows(s_inverse, p.scale.s_inverse, p.scale.s_inverse_step, p.m, at);
      store_pruned_scaled<View>(accumulators[s], p, at, {p, at}, s_inverse);
    } else if constexpr (Config::kPrune) {
      store_pruned<View>(accumulators[s], p, at);
    } else {
      store_dense<View>(accumulators[s], p, at, {p, at});
    }
  }
}

}  // namespace srelu24
