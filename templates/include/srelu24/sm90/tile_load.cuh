// Global to shared memory: the TMA loads of one CTA, one k-block at a time.
//
// Rows of B are loaded in an order that gives every thread of a wgmma whole groups of neighbouring output
// columns, so that the epilogue needs no shuffles. In the accumulators a thread (t = lane % 4) owns columns
// 8j + 2t + b of a row; the load puts at that column
//
//   LoadOrder::kOwn8   output column  8t + 2j + b        of each 32  (8 neighbours: one 16-byte store)
//   LoadOrder::kOwn16  output column 16t + 2j + b        of each 64  (16 neighbours: 4 groups of 4)
//
// A box is {64 of k, b: 2, t: 4, j: 4} = 32 rows of 128 bytes. As a tensor map, with strides in rows of B:
// kOwn8 {k, 2 x 1, n/8 x 8, 4 x 2}; kOwn16 the same with 16 for 8, once from row 0 (j < 4) and once from
// row 8 (j >= 4). The t dimension runs over all of B, so the TMA's own bounds handle every n % 8 == 0.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include <srelu24/sm90/pipeline.cuh>
#include <srelu24/sm90/raster.cuh>

namespace srelu24 {

enum class LoadOrder { kOwn8, kOwn16 };

/// Issues the loads of a CTA's tiles, k-block after k-block. One thread owns it.
template <class Config>
struct TileLoader {
  GemmParams const& params;
  SharedStorage<Config>& shared;
  LoaderState<Config>& next;
  int const cta;  // rank in the cluster

  /// Begin at `tile_index`, with every stage free.
  __device__ __forceinline__ void start(int tile_index) {
    next.ring = {0, 1};
    next.tile_index = tile_index;
    next.k_block = 0;
    locate();
  }

  /// Issue the next k-block's loads, if there is one. Waits until its stage is free.
  __device__ __forceinline__ bool load_next() {
    if (next.tile_index >= raster_of<Config>(params).tiles()) return false;
    int const stage = next.ring.stage;
    shared.empty[stage].wait(next.ring.phase);
    shared.full[stage].arrive_and_expect_tx(Config::kStageBytesA + Config::kStageBytesB);
    auto* barrier = reinterpret_cast<uint64_t*>(&shared.full[stage]);

    int const k = next.k_block * Config::kTileK;
    cute::SM90_TMA_LOAD_2D::copy(&params.a, barrier, kCacheHint, shared.a[stage], Config::kSparse ? k / 2 : k,
                                 next.row);
#pragma unroll
    for (int i = 0; i < kBoxesPerCta; ++i) load_box(barrier, stage, cta * kBoxesPerCta + i, k);

    next.ring.advance();
    if (++next.k_block == k_blocks_of<Config>(params)) {
      next.k_block = 0;
      next.tile_index += gridDim.x / Config::kClusterM;
      locate();
    }
    return true;
  }

 private:
  static constexpr int kBoxRows = 32;
  static constexpr int kBoxesPerCta = Config::kTileN / kBoxRows / Config::kClusterM;
  static constexpr uint64_t kCacheHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  __device__ __forceinline__ void locate() {
    Tile const tile = raster_of<Config>(params)(next.tile_index);
    next.row = (tile.m * Config::kClusterM + cta) * Config::kTileM;
    next.column = tile.n * Config::kTileN;
  }

  /// Box `i` of the tile's B: 32 rows, multicast to every CTA of the cluster.
  __device__ __forceinline__ void load_box(uint64_t* barrier, int stage, int i, int k) {
    constexpr bool kOwn16 = Config::kLoadOrder == LoadOrder::kOwn16;
    TensorMap const* map = &params.b[kOwn16 ? i & 1 : 0];
    int const t = kOwn16 ? (next.column + 64 * (i >> 1)) / 16 : (next.column + 32 * i) / 8;
    void* destination = shared.b[stage] + i * kBoxRows * 128;
    if constexpr (Config::kClusterM > 1) {
      constexpr uint16_t kEveryCta = (1 << Config::kClusterM) - 1;
      cute::SM90_TMA_LOAD_MULTICAST_4D::copy(map, barrier, kEveryCta, kCacheHint, destination, k, 0, t, 0);
    } else {
      cute::SM90_TMA_LOAD_4D::copy(map, barrier, kCacheHint, destination, k, 0, t, 0);
    }
  }
};

}  // namespace srelu24
