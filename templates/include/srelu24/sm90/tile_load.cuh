// Global to shared memory: the TMA loads of one CTA, one k-block at a time.
//
// Rows of B are loaded in an order that gives every thread of a wgmma whole groups of neighbouring output
// columns, so that the epilogue needs no shuffles. In the accumulators a thread (t = lane % 4) owns columns
// 8j + 2t + b of a row; the load puts at that column
//
//   LoadOrder::kOwn8   output column  8t + 2j + b        of each 32  (8 neighbours: one 16-byte store)
//   LoadOrder::kOwn16  output column 16t + 2j + b        of each 64  (16 neighbours: 4 groups of 4)
//
// Rows come in blocks of 32 (kOwn8) or 64 (kOwn16). One box loads a CTA's whole share of the tile:
//
//   b_share   {k, b: 2, t: 4, j, blocks}    strides in rows of B: 1, 8 or 16, 2, the block
//
// The TMA's bounds cannot cut inside a block, so the share that holds the ragged end of B (n not a multiple of
// the block) is loaded in boxes of 32 rows from maps whose t dimension runs over all of B and ends where B does:
//
//   b_rows    {k, b: 2, t: n/8, j: 4}       strides 1, 8, 2;  for kOwn16 t: n/16 with stride 16, once from
//                                           row 0 (j < 4) and once from row 8 (j >= 4)
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include <srelu24/sm90/pipeline.cuh>
#include <srelu24/sm90/work.cuh>

namespace srelu24 {

enum class LoadOrder { kOwn8, kOwn16 };

/// Issues the loads of a CTA's tiles, k-block after k-block. One thread owns it.
template <class Config>
struct TileLoader {
  GemmParams const& params;
  SharedStorage<Config>& shared;
  LoaderState& state;
  int const cta;  // rank in the cluster

  /// Begin with the work at `index`, with every stage free.
  __device__ __forceinline__ void start(int index) { begin(index, 0, 1); }

  /// Issue the next k-block's loads, if there is one. Waits until its stage is free.
  __device__ __forceinline__ bool load_next() {
    NextLoad load = state.load;
    if (load.k >= state.k_end) return false;
    int const stage = load.stage;
    shared.empty[stage].wait(load.phase);
    shared.full[stage].arrive_and_expect_tx(Config::kStageBytesA + Config::kStageBytesB);
    auto* barrier = reinterpret_cast<uint64_t*>(&shared.full[stage]);

    cute::SM90_TMA_LOAD_2D::copy(&params.a, barrier, kCacheHint, shared.a[stage], Config::kSparse ? load.k / 2 : load.k,
                                 load.row);
    uint8_t* const share = shared.b[stage] + cta * kShareRows * 128;
    if (Config::kRaggedN && load.ragged) {
#pragma unroll 1
      for (int first = 0; first < kShareRows; first += kBoxRows) load_rows(barrier, share, first, load);
    } else {
      load_share(barrier, share, load);
    }

    load.k += Config::kTileK;
    if (++load.stage == Config::kStages) {
      load.stage = 0;
      load.phase ^= 1;
    }
    if (load.k < state.k_end) {
      state.load = load;
    } else {
      begin(state.index + gridDim.x / Config::kClusterM, load.stage, load.phase);
    }
    return true;
  }

 private:
  static constexpr bool kOwn16 = Config::kLoadOrder == LoadOrder::kOwn16;
  static constexpr int kBlockRows = kOwn16 ? 64 : 32, kRun = kBlockRows / 4;
  static constexpr int kShareRows = Config::kTileN / Config::kClusterM;
  static constexpr int kBoxRows = 32;
  static constexpr uint16_t kEveryCta = (1 << Config::kClusterM) - 1;
  static constexpr uint64_t kCacheHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  __device__ __forceinline__ void begin(int index, uint8_t stage, uint8_t phase) {
    Work const work = work_at<Config>(params, index);
    int const row = (work.tile.m * Config::kClusterM + cta) * Config::kTileM;
    int const column = work.tile.n * Config::kTileN + cta * kShareRows;
    int const end = params.n / kBlockRows * kBlockRows;  // of the whole blocks
    bool const ragged = Config::kRaggedN && end < params.n && column <= end && end < column + kShareRows;
    state.load = {work.k_begin * Config::kTileK, row, column, stage, phase, ragged};
    state.k_end = work.exists() ? work.k_end * Config::kTileK : 0;
    state.index = index;
  }

  __device__ __forceinline__ void load_share(uint64_t* barrier, void* share, NextLoad const& load) {
    int const block = load.column / kBlockRows;
    if constexpr (Config::kClusterM > 1) {
      cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&params.b_share, barrier, kEveryCta, kCacheHint, share, load.k, 0, 0, 0,
                                             block);
    } else {
      cute::SM90_TMA_LOAD_5D::copy(&params.b_share, barrier, kCacheHint, share, load.k, 0, 0, 0, block);
    }
  }

  /// Rows [first, first + 32) of the share.
  __device__ __forceinline__ void load_rows(uint64_t* barrier, uint8_t* share, int first, NextLoad const& load) {
    TensorMap const* map = &params.b_rows[kOwn16 && first % 64 != 0];
    int const t = (load.column + first / kBlockRows * kBlockRows) / kRun;
    void* const destination = share + first * 128;
    if constexpr (Config::kClusterM > 1) {
      cute::SM90_TMA_LOAD_MULTICAST_4D::copy(map, barrier, kEveryCta, kCacheHint, destination, load.k, 0, t, 0);
    } else {
      cute::SM90_TMA_LOAD_4D::copy(map, barrier, kCacheHint, destination, load.k, 0, t, 0);
    }
  }
};

}  // namespace srelu24
