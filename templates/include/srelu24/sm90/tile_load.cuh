// Global to shared memory: the TMA loads of one CTA, one k-block at a time.
//
// Rows of B are loaded in a LoadOrder, in blocks of 32 (kOwn8) or 64 (kOwn16). One box loads a CTA's whole share of the
// tile:
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

#include <srelu24/load_order.cuh>
#include <srelu24/sm90/pipeline.cuh>

namespace srelu24 {

/// Issues the loads of one CTA. One thread owns it.
template <class Config>
struct TileLoader {
  using Ring = RingPosition<Config::kStages>;

  GemmParams const& params;
  SharedStorage<Config>& shared;
  int const cta;  // rank in the cluster

  /// What this CTA has to load for the work at `index`.
  __device__ __forceinline__ Load of(int index) const {
    Work const work = work_at<Config>(params, index);
    return {work.k_begin * Config::kTileK, work.exists() ? work.k_end * Config::kTileK : work.k_begin * Config::kTileK,
            (work.tile.m * Config::kClusterM + cta) * Config::kTileM, work.tile.n * Config::kTileN + cta * kShareRows};
  }

  /// Waits until the stage at `at` is free, then issues the loads of the next k-block into it.
  __device__ __forceinline__ void issue(Load& load, Ring const& at) const {
    shared.empty[at.stage].wait(at.phase);
    shared.full[at.stage].arrive_and_expect_tx(Config::kStageBytesA + Config::kStageBytesB);
    auto* barrier = reinterpret_cast<uint64_t*>(&shared.full[at.stage]);

    if constexpr (Config::kPermuted && !Config::kSparse) {
      cute::SM90_TMA_LOAD_3D::copy(&params.a, barrier, kCacheHint, shared.a[at.stage], load.k, 0, load.row / 16);
    } else {
      cute::SM90_TMA_LOAD_2D::copy(&params.a, barrier, kCacheHint, shared.a[at.stage],
                                   Config::kSparse ? load.k / 2 : load.k, load.row);
    }
    uint8_t* const share = shared.b[at.stage] + cta * kShareRows * 128;
    if (Config::kRaggedN && is_ragged(load.column)) {
#pragma unroll 1
      for (int first = 0; first < kShareRows; first += kBoxRows) load_rows(barrier, share, first, load);
    } else {
      load_share(barrier, share, load);
    }
    load.k += Config::kTileK;
  }

 private:
  static constexpr bool kOwn16 = Config::kLoadOrder == LoadOrder::kOwn16;
  static constexpr int kBlockRows = kOwn16 ? 64 : 32, kRun = kBlockRows / 4;
  static constexpr int kShareRows = Config::kTileN / Config::kClusterM;
  static constexpr int kBoxRows = 32;
  static_assert(
      Config::kTileN % Config::kClusterM == 0 && kShareRows % kBlockRows == 0,
      "tile_n / cluster_m must be a multiple of the load block: of 32 rows of B, or 64 where the output is packed");
  static_assert(kBlockRows % kBoxRows == 0, "the boxes of a ragged share lie inside of load blocks");
  static_assert(Config::kTileM <= 256, "a TMA box has at most 256 rows");
  static constexpr uint16_t kEveryCta = (1 << Config::kClusterM) - 1;
  static constexpr uint64_t kCacheHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  /// Whether the share that begins at `column` holds the end of B inside a block of rows.
  __device__ __forceinline__ bool is_ragged(int column) const {
    int const end = params.n / kBlockRows * kBlockRows;  // of the whole blocks
    return end < params.n && column <= end && end < column + kShareRows;
  }

  __device__ __forceinline__ void load_share(uint64_t* barrier, void* share, Load const& load) const {
    int const block = load.column / kBlockRows;
    if constexpr (Config::kClusterM > 1) {
      cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&params.b_share, barrier, kEveryCta, kCacheHint, share, load.k, 0, 0, 0,
                                             block);
    } else {
      cute::SM90_TMA_LOAD_5D::copy(&params.b_share, barrier, kCacheHint, share, load.k, 0, 0, 0, block);
    }
  }

  /// Rows [first, first + 32) of the share.
  __device__ __forceinline__ void load_rows(uint64_t* barrier, uint8_t* share, int first, Load const& load) const {
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

/// A consumer thread that also loads, one k-block in each step of its mainloop. What it loads next is in registers,
/// since what it reads from shared memory in a step presumably waits behind the tensor cores' own reads
/// (docs/performance-log.md). What comes after is computed between tiles, where registers are free, and kept in shared
/// memory until its turn.
template <class Config>
struct ProducerThread {
  static constexpr int kLag = Config::kProducerLag;

  TileLoader<Config> const loader;
  bool const active;  // whether this is the thread that loads
  int work = 0;       // number of the work that `load` belongs to
  Load load;

  __device__ __forceinline__ ProducerThread(GemmParams const& params, SharedStorage<Config>& shared, int cta)
      : loader{params, shared, cta}, active(threadIdx.x < 32 && cute::elect_one_sync()) {}

  /// Fill the ring up to kLag stages: the stage refilled in step i was read in step i - kLag, so every consumer of the
  /// cluster has had time to release it.
  __device__ __forceinline__ void start() {
    for (int w = 0; w < kWorksAhead<Config> - 1; ++w) prepare(w);
    if (active) load = loader.shared.loads[0];
    RingPosition<Config::kStages> ring{0, 1};
    for (int i = 0; i < Config::kStages - kLag; ++i, ring.advance()) step(ring);
  }

  /// Called before the mainloop of work w: prepares the last work that may be loaded in the course of it.
  __device__ __forceinline__ void before_work(int w) { prepare(w + kWorksAhead<Config> - 1); }

  /// Called once for each k-block of the mainloop, with the consumer at `ring`.
  __device__ __forceinline__ void in_step(RingPosition<Config::kStages> const& ring) { step(ring.ahead(kLag)); }

 private:
  __device__ __forceinline__ void prepare(int w) const {
    if (active) {
      int const first = blockIdx.x / Config::kClusterM, clusters = gridDim.x / Config::kClusterM;
      loader.shared.loads[w % kWorksAhead<Config>] = loader.of(first + w * clusters);
    }
  }

  __device__ __forceinline__ void step(RingPosition<Config::kStages> const& at) {
    if (active && load.k != load.k_end) {
      loader.issue(load, at);
      if (load.k == load.k_end) load = loader.shared.loads[++work % kWorksAhead<Config>];
    }
    __syncwarp();
  }
};

/// What stands in the place of ProducerThread in kernels with a producer warpgroup: it does nothing.
struct NoProducer {
  __device__ __forceinline__ void before_work(int) const {}
  template <class Ring>
  __device__ __forceinline__ void in_step(Ring const&) const {}
};

}  // namespace srelu24
