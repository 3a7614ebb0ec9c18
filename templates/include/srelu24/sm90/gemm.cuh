// The GEMM kernels: persistent, warp-specialised or with a producing consumer, from TMA to epilogue.
//
// Config (bound by the template) names the element type, the tile, the MMA atoms, the load order and the
// epilogue. With a producer warpgroup, warpgroup 0 only loads and hands its registers to the consumers.
// Without one, thread 0 of the first consumer loads between its MMAs, which leaves room for three
// consumers of 168 registers: a 192-row tile reads fewer bytes per FLOP than a 128-row one.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include <srelu24/sm90/epilogue.cuh>
#include <srelu24/sm90/mainloop.cuh>
#include <srelu24/sm90/stream_k.cuh>
#include <srelu24/sm90/tile_load.cuh>

namespace srelu24 {

/// One consumer warpgroup: every tile of its cluster, mainloop then epilogue.
template <class Config, class Between>
__device__ __forceinline__ void consume(GemmParams const& p, SharedStorage<Config>& shared, int cta, int consumer,
                                        Between&& between) {
  Mainloop<Config> mainloop(shared, consumer);
  typename Mainloop<Config>::Accumulators accumulators;

  auto first_row = [&](Tile tile) { return (tile.m * Config::kClusterM + cta) * Config::kTileM + consumer * 64; };
  auto position = [&](Tile tile) { return block_position(first_row(tile), tile.n * Config::kTileN); };
  auto metadata_of = [&](Work const& work) {  // rows beyond M read the last block's E; their result is dropped
    int64_t const block = min(first_row(work.tile) / 64, (p.m - 1) / 64);
    return p.metadata + (block * ((p.k + 255) / 256) + work.k_begin / 4) * 128 + threadIdx.x % 128;
  };

  int index = blockIdx.x / Config::kClusterM;
  uint32_t e[4] = {};
  if constexpr (Config::kSparse) Mainloop<Config>::load_vector(e, metadata_of(work_at<Config>(p, index)));
  while (true) {
    {
      Work const work = work_at<Config>(p, index);
      if constexpr (Config::kInitialized) initialize<Config>(accumulators, p, position(work.tile), work.k_begin == 0);
      if constexpr (Config::kSparse) {
        mainloop.sparse(accumulators, work.k_end - work.k_begin, metadata_of(work), e, between);
      } else {
        mainloop.dense(accumulators, work.k_end - work.k_begin, between);
      }
    }
    // Worked out again rather than kept: in the mainloop registers are short.
    Work const done = work_at<Config>(p, index);
    index += gridDim.x / Config::kClusterM;
    bool const more = work_at<Config>(p, index).exists();
    if constexpr (Config::kSparse) {  // the next E arrives while this tile is stored
      if (more) Mainloop<Config>::load_vector(e, metadata_of(work_at<Config>(p, index)));
    }
    bool whole = true;
    if constexpr (Config::kStreamK) whole = reduce<Config>(accumulators, p, done, cta, consumer);
    BlockPosition const at = position(done.tile);
    if (whole && at.block * 64 < p.m) {
      if constexpr (Config::kPrune) {
        store_pruned<Config>(accumulators, p, at);
      } else {
        store_dense<Config>(accumulators, p, at);
      }
    }
    if (!more) return;
  }
}

/// The whole kernel. The grid is whole clusters, and every cluster has work.
template <class Config>
__device__ __forceinline__ void gemm(GemmParams const& p) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];  // the swizzle patterns repeat every 1024 bytes
  if (cute::cast_smem_ptr_to_uint(dynamic_shared) % 1024 != 0) __trap();
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);

  int const cta = Config::kClusterM > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.a));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.b_share));
    init_barriers(shared);
  }
  auto sync_cluster = [] {
    if constexpr (Config::kClusterM > 1) {
      cute::cluster_sync();
    } else {
      __syncthreads();
    }
  };
  sync_cluster();

  int const warpgroup = threadIdx.x / 128;
  int const first_tile = blockIdx.x / Config::kClusterM;
  if constexpr (Config::kProducerWarpgroup) {
    if (warpgroup == 0) {
      if constexpr (Config::kConsumers > 1) cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
      if (threadIdx.x < 32 && cute::elect_one_sync()) {
        LoaderState state;
        TileLoader<Config> loader{p, shared, state, cta};
        loader.start(first_tile);
        while (loader.load_next()) {
        }
      }
    } else {
      if constexpr (Config::kConsumers > 1) cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
      consume<Config>(p, shared, cta, warpgroup - 1, [] {});
    }
  } else {
    // Loads run kLag stages short of a full ring: the stage refilled in step i was read in step i - kLag, so every
    // consumer of the cluster has had time to release it.
    constexpr int kLag = 2;
    TileLoader<Config> loader{p, shared, shared.loader, cta};
    bool const loads = threadIdx.x < 32 && cute::elect_one_sync();
    auto produce = [&] {
      if (loads) loader.load_next();
      __syncwarp();
    };
    if (loads) loader.start(first_tile);
    for (int i = 0; i < Config::kStages - kLag; ++i) produce();
    consume<Config>(p, shared, cta, warpgroup, produce);
  }
  sync_cluster();  // a CTA must not leave while its peer still signals its barriers
}

}  // namespace srelu24
