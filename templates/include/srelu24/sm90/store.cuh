// Which epilogue stores a consumer warpgroup's part of a tile, and for which kernels there are registers to load ahead
// of time what it needs.
#pragma once

#include <srelu24/epilogue_scaled.cuh>
#include <srelu24/sm90/params.cuh>

namespace srelu24 {

/// Whether a consumer keeps in registers what it needs between two mainloops: its pieces, and the scales of the tile's
/// columns. What it reads of shared memory there waits behind the other warpgroup's MMAs, and an 8-bit mainloop is
/// short. Biases would take the registers; where tiles are split it was slower (docs/performance-log.md).
template <class Config>
inline constexpr bool kHoldsScales =
    Config::kScaled && Config::kSparse && Config::kProducerWarpgroup && Config::kConsumers == 2 && !Config::kBias &&
    !Config::kPromote && !Config::kStreamK;

/// Whether there are registers for what can be loaded before it is needed: the scales of a thread's rows in the
/// mainloop, and the next tile's first E before this tile is stored.
template <class Config>
inline constexpr bool kLoadsEarly =
    !(Config::kScaled && Config::kConsumers == 3 && (Config::kSparse || Config::kStreamK));

/// This thread's place in a block of 64 rows whose first row and column are these.
__device__ __forceinline__ BlockPosition block_position(int first_row, int first_column) {
  int const thread = threadIdx.x % 128;
  return {first_row + thread / 32 * 16 + thread % 32 / 4, first_column, first_row / 64, thread};
}

/// Stores this thread's part of a tile whose sums are whole.
template <class Config>
__device__ __forceinline__ void store_tile(float (&accumulators)[Config::kTileN / 2], GemmParams const& p,
                                           BlockPosition const& at) {
  if constexpr (Config::kHiddenGradient) {
    store_hidden_gradient<Config>(accumulators, p, at);
  } else if constexpr (Config::kAlongTokens) {
    store_weight_gradient<Config>(accumulators, p, at);
  } else if constexpr (Config::kPrune) {
    store_pruned<Config>(accumulators, p, at);
  } else {
    store_dense<Config>(accumulators, p, at, {p, at});
  }
}

/// The same for 8-bit sums, which are scaled first.
template <class Config, class Scaling>
__device__ __forceinline__ void store_scaled_tile(float (&accumulators)[Config::kTileN / 2], GemmParams const& p,
                                                  BlockPosition const& at, Scaling const& scaling,
                                                  float const (&s_inverse)[2]) {
  if constexpr (Config::kPrune) {
    store_pruned_scaled<Config>(accumulators, p, at, scaling, s_inverse);
  } else {
    store_dense<Config>(accumulators, p, at, scaling);
  }
}

}  // namespace srelu24
