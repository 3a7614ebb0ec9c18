// The wgmma GEMM kernels, from TMA to epilogue. CTAs are persistent: each works on one tile after the other.
//
// Config (bound by the template) names the element type, the tile, the MMA atoms, the load order and the epilogue. With
// a producer warpgroup, warpgroup 0 only loads (`produce`) and hands its registers to the consumers (`consume`).
// Without one, thread 0 of the first consumer loads between its MMAs (ProducerThread), which leaves room for three
// consumers of 168 registers: a tile of 192 rows reads fewer bytes per FLOP than one of 128.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include <srelu24/sm90/mainloop.cuh>
#include <srelu24/sm90/store.cuh>
#include <srelu24/sm90/stream_k.cuh>
#include <srelu24/sm90/tile_load.cuh>
#include <srelu24/sm90/tile_load_tokens.cuh>

namespace srelu24 {

/// What a consumer warpgroup does of work number `w` of its cluster.
template <class Config>
__device__ __forceinline__ Piece piece_of(GemmParams const& p, int cta, int consumer, int w) {
  Work const work = work_at<Config>(p, (blockIdx.x + w * gridDim.x) / Config::kClusterM);
  int const row = (work.tile.m * Config::kClusterM + cta) * Config::kTileM + consumer * 64;
  return {row, work.tile.n * Config::kTileN, work.k_begin, work.exists() ? work.k_end : work.k_begin};
}

/// Where the E of a thread begins for a piece. Rows beyond M read the last block's E; their result is dropped.
template <class Config>
__device__ __forceinline__ uint4 const* metadata_of(GemmParams const& p, Piece const& piece) {
  return MetadataLayout(p.k).vectors(p.metadata, min(piece.row, p.m - 1) / 64, piece.k_begin / kVectorBlocks<Config>) +
         threadIdx.x % 128;
}

/// The producer warpgroup: one of its threads loads the k-blocks of all the cluster's works, one after the other.
template <class Config>
__device__ __forceinline__ void produce(GemmParams const& p, SharedStorage<Config>& shared, int cta) {
  if (threadIdx.x < 32 && cute::elect_one_sync()) {
    TileLoader<Config> const loader{p, shared, cta};
    RingPosition<Config::kStages> ring{0, 1};
    int index = blockIdx.x / Config::kClusterM;
    for (Load load = loader.of(index); load.k != load.k_end;) {
      loader.issue(load, ring);
      ring.advance();
      if (load.k == load.k_end) load = loader.of(index += gridDim.x / Config::kClusterM);
    }
  }
}

/// A consumer warpgroup: for each of its cluster's works, the mainloop and then the epilogue.
template <class Config, class Producer>
__device__ __forceinline__ void consume(GemmParams const& p, SharedStorage<Config>& shared, int cta, int consumer,
                                        Producer& producer) {
  Mainloop<Config> mainloop(shared, consumer);
  typename Mainloop<Config>::Accumulators accumulators;
  constexpr bool kHeld = kHoldsScales<Config>, kEarly = kLoadsEarly<Config>;
  Pieces own;
  auto& pieces = [&]() -> auto& {  // in this thread's registers, or in its warp's place in shared memory
    if constexpr (kHeld) {
      return own;
    } else {
      return shared.pieces[consumer * 4 + threadIdx.x % 128 / 32];
    }
  }();

  pieces.advance(-1, piece_of<Config>(p, cta, consumer, 0));
  uint32_t e[4] = {};                                                  // the next piece's first vector of E
  float row_scale[2], s_inverse[2], column_scale[Config::kTileN / 4];  // 8 bits: of this thread's rows and columns
  auto load_row_scales = [&] {
    BlockPosition const at = block_position(pieces.now.row, pieces.now.column);
    load_of_rows(row_scale, p.scale.a, p.scale.a_step, p.m, at);
    if constexpr (kStoresE4m3<Config>) load_of_rows(s_inverse, p.scale.s_inverse, p.scale.s_inverse_step, p.m, at);
  };
  if constexpr (Config::kSparse) Mainloop<Config>::load_vector(e, metadata_of<Config>(p, pieces.next));

  while (pieces.next.exists()) {
    // ---- work: move on to the next piece, and work out the one after it while registers are free
    {
      int const w = pieces.number + 1;
      pieces.advance(w, piece_of<Config>(p, cta, consumer, w + 1));
      producer.before_work(w);
      Piece const now = pieces.now;

      // ---- mainloop: from bias and residual, or zero, through the piece's k-blocks
      if constexpr (Config::kScaled) {
        if (consumer == 0 && threadIdx.x % 128 == 0) shared.columns.load(p, w, now.column);
      }
      initialize<Config>(accumulators, p, block_position(now.row, now.column), now.k_begin == 0);
      auto at_end = [&] {  // while the last MMAs run
        if constexpr (Config::kScaled && kEarly) load_row_scales();
        if constexpr (kHeld) {
          shared.columns.wait(pieces.number);
          load_of_columns<Config>(column_scale, shared.columns.scale[pieces.number % 2], block_position(0, 0));
        }
      };
      if constexpr (Config::kSparse) {
        mainloop.sparse(accumulators, now.k_end - now.k_begin, metadata_of<Config>(p, now), e, producer, at_end);
      } else {
        mainloop.dense(accumulators, now.k_end - now.k_begin, producer, at_end);
      }
    }

    // ---- epilogue: add up the pieces of a split tile, and store what is whole
    bool whole = true;
    if constexpr (Config::kStreamK) whole = reduce<Config>(accumulators, p, pieces.now, cta, consumer);
    auto load_next_metadata = [&] {
      if (pieces.next.exists()) Mainloop<Config>::load_vector(e, metadata_of<Config>(p, pieces.next));
    };
    if constexpr (Config::kSparse && kEarly) load_next_metadata();  // it arrives while this tile is stored
    // Scales are waited for even where nothing is stored: no copy may still be on its way when the CTA ends.
    if constexpr (Config::kScaled && !kHeld) shared.columns.wait(pieces.number);
    if (whole && pieces.now.row < p.m) {
      BlockPosition const at = block_position(pieces.now.row, pieces.now.column);
      if constexpr (Config::kScaled) {
        if constexpr (!kEarly) load_row_scales();
        int const turn = pieces.number % 2;
        Scaling<Config, GemmParams, kHeld> const scaling(
            p, at, row_scale, kHeld ? column_scale : shared.columns.scale[turn], shared.columns.bias[turn]);
        store_scaled_tile<Config>(accumulators, p, at, scaling, s_inverse);
      } else {
        store_tile<Config>(accumulators, p, at);
      }
    }
    if constexpr (Config::kScaled) shared.columns.release(pieces.number);
    if constexpr (Config::kSparse && !kEarly) load_next_metadata();
  }
}

/// The whole kernel. The grid is whole clusters, and every cluster has work.
template <class Config>
__device__ __forceinline__ void gemm(GemmParams const& p) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];  // the swizzle patterns repeat every 1024 bytes
  if (cute::cast_smem_ptr_to_uint(dynamic_shared) % 1024 != 0) __trap();
  static_assert(sizeof(SharedStorage<Config>) == Config::kSharedBytes,
                "the kernel is launched with just the shared memory that it lays out (bindings.py)");
  static_assert(Config::kTileM == 64 * Config::kConsumers, "a consumer warpgroup owns 64 rows of the tile");
  static_assert(Config::kClusterM <= 4, "warp w of a consumer tells CTA w that a stage is free, and it has four warps");
  static_assert(Config::kStages > (Config::kProducerWarpgroup ? 1 : Config::kProducerLag),
                "the ring is deeper than what the producer leaves empty");
  static_assert(MetadataLayout::kVectorColumns % Config::kTileK == 0, "a vector of E feeds whole k-blocks");
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);

  int const cta = blockIdx.x % Config::kClusterM;  // rank in the cluster
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
  if constexpr (Config::kProducerWarpgroup) {
    if (warpgroup == 0) {
      if constexpr (Config::kConsumers > 1) cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
      produce<Config>(p, shared, cta);
    } else {
      if constexpr (Config::kConsumers > 1) cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
      NoProducer none;
      consume<Config>(p, shared, cta, warpgroup - 1, none);
    }
  } else {
    ProducerThread<Config> producer(p, shared, cta);
    producer.start();
    consume<Config>(p, shared, cta, warpgroup, producer);
  }
  sync_cluster();  // a CTA must not leave while its peer still signals its barriers
}

}  // namespace srelu24
