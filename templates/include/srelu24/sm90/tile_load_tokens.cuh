// Loads of spgemm_tokens, whose reduction runs along tokens: both operands have their own dimension, not K, contiguous
// (MN-major), and B's rows are tokens in the order of the groups (srelu24/training/order.py).
//
//   a        {feature: 64, kc, blocks of 64 features}     packed values [k / 2, m]; kc counts kept values along tokens
//   b_share  {column: 64, b: 2, i: 8, block of 16, blocks of 64 columns}
//
// Position 2 i + b of a block of 16 is its row i + 8 b. In shared memory 64 features, or columns, are one swizzled row
// of 128 bytes, and K runs over the rows.
#pragma once

#include <srelu24/sm90/tile_load.cuh>

namespace srelu24 {

template <class Config>
  requires(Config::kAlongTokens)
struct TileLoader<Config> {
  GemmParams const& params;
  SharedStorage<Config>& shared;
  int const cta;  // rank in the cluster

  /// What this CTA has to load for the work at `index`.
  __device__ __forceinline__ Load of(int index) const {
    Work const work = work_at<Config>(params, index);
    return {work.k_begin * Config::kTileK, work.exists() ? work.k_end * Config::kTileK : work.k_begin * Config::kTileK,
            (work.tile.m * Config::kClusterM + cta) * Config::kTileM,
            work.tile.n * Config::kTileN + cta * kShareColumns};
  }

  /// Waits until the stage at `at` is free, then issues the loads of the next k-block into it.
  __device__ __forceinline__ void issue(Load& load, RingPosition<Config::kStages> const& at) const {
    shared.empty[at.stage].wait(at.phase);
    shared.full[at.stage].arrive_and_expect_tx(Config::kStageBytesA + Config::kStageBytesB);
    auto* barrier = reinterpret_cast<uint64_t*>(&shared.full[at.stage]);
    cute::SM90_TMA_LOAD_3D::copy(&params.a, barrier, kCacheHint, shared.a[at.stage], 0, load.k / 2, load.row / 64);
    uint8_t* const share = shared.b[at.stage] + cta * kShareColumns * 128;
    if constexpr (Config::kClusterM > 1) {
      cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&params.b_share, barrier, (1 << Config::kClusterM) - 1, kCacheHint, share,
                                             0, 0, 0, load.k / 16, load.column / 64);
    } else {
      cute::SM90_TMA_LOAD_5D::copy(&params.b_share, barrier, kCacheHint, share, 0, 0, 0, load.k / 16, load.column / 64);
    }
    load.k += Config::kTileK;
  }

 private:
  static constexpr int kShareColumns = Config::kTileN / Config::kClusterM;
  static_assert(Config::kTileN % Config::kClusterM == 0 && kShareColumns % 64 == 0,
                "tile_n / cluster_m must be a multiple of the 64 columns that one swizzled row holds");
  static_assert(Config::kTileM % 64 == 0, "tile_m must be a multiple of the 64 features that one swizzled row holds");
  static constexpr uint64_t kCacheHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
};

}  // namespace srelu24
