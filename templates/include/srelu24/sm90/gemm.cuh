// The GEMM kernels: persistent, warp-specialised or with a producing consumer, from TMA to epilogue.
//
// Config (bound by the template) names the element type, the tile, the MMA atoms, the load order and the
// epilogue. With a producer warpgroup, warpgroup 0 only loads and hands its registers to the consumers.
// Without one, thread 0 of the first consumer loads between its MMAs, which leaves room for three
// consumers of 168 registers: a 192-row tile moves 14 % fewer bytes per FLOP than a 128-row one.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include <srelu24/sm90/epilogue.cuh>
#include <srelu24/sm90/mainloop.cuh>
#include <srelu24/sm90/tile_load.cuh>

namespace srelu24 {

/// One consumer warpgroup: every tile of its cluster, mainloop then epilogue.
template <class Config, class Between>
__device__ __forceinline__ void consume(GemmParams const& p, SharedStorage<Config>& shared, int cta, int consumer,
                                        Between&& between) {
  Mainloop<Config> mainloop(shared, consumer);
  typename Mainloop<Config>::Accumulators accumulators;

  auto first_row = [&](Tile tile) { return (tile.m * Config::kClusterM + cta) * Config::kTileM + consumer * 64; };
  auto metadata_of = [&](Tile tile) {  // rows beyond M read the last block's E; their result is dropped
    int64_t const block = min(first_row(tile) / 64, (p.m - 1) / 64);
    return p.metadata + block * ((p.k + 255) / 256) * 128 + threadIdx.x % 128;
  };

  auto position = [&](Tile tile) { return block_position(first_row(tile), tile.n * Config::kTileN); };

  int index = blockIdx.x / Config::kClusterM;
  uint32_t e[4] = {};
  if constexpr (Config::kSparse) Mainloop<Config>::load_vector(e, metadata_of(raster(p.raster, index)));
  while (true) {
    if constexpr (Config::kInitialized) initialize<Config>(accumulators, p, position(raster(p.raster, index)));
    if constexpr (Config::kSparse) {
      mainloop.sparse(accumulators, p.k_blocks, metadata_of(raster(p.raster, index)), e, between);
    } else {
      mainloop.dense(accumulators, p.k_blocks, between);
    }
    BlockPosition const at = position(raster(p.raster, index));
    index += gridDim.x / Config::kClusterM;
    if constexpr (Config::kSparse) {  // the next tile's E arrives while this one is stored
      if (index < p.raster.tiles) Mainloop<Config>::load_vector(e, metadata_of(raster(p.raster, index)));
    }
    if (at.block * 64 < p.m) {
      if constexpr (Config::kPrune) {
        store_pruned<Config>(accumulators, p, at);
      } else {
        store_dense<Config>(accumulators, p, at);
      }
    }
    if (index >= p.raster.tiles) return;
  }
}

/// The whole kernel. The grid is a multiple of the cluster and no larger than the number of cluster tiles.
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
    // Loads run kLag stages behind a full ring: the stage being refilled was released kLag steps ago.
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
