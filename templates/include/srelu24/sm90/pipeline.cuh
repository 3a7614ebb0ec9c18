// The shared-memory ring between the TMA and the tensor cores, and what else lies in shared memory.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cuda/std/type_traits>
#include <cute/arch/copy_sm90_tma.hpp>

#include <srelu24/sm90/work.cuh>

namespace srelu24 {

/// A stage of the ring, and the parity of the phase that is waited for at its barriers.
template <int Stages>
struct RingPosition {
  int stage;
  uint32_t phase;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ int previous() const { return stage == 0 ? Stages - 1 : stage - 1; }

  /// Where a producer stands that is `Stages - lag` k-blocks ahead; its parity is that of `empty`.
  __device__ __forceinline__ RingPosition ahead(int lag) const {
    bool const wraps = stage >= lag;
    return {wraps ? stage - lag : stage + Stages - lag, wraps ? phase : phase ^ 1};
  }
};

/// What a CTA still has to load for a piece of work. 16 bytes: one access to shared memory.
struct alignas(16) Load {
  int k, k_end;  // next and end, in elements; nothing is left once they meet
  int row;       // first row of A that this CTA loads
  int column;    // first row of B in this CTA's share: a column of the output
};

/// How many works a producer thread may know of, from the one that its warpgroup multiplies on. It loads at most
/// kStages - kProducerLag k-blocks ahead, each of which may be a work of its own, and knows the work that it loads
/// next.
template <class Config>
inline constexpr int kWorksAhead = Config::kStages - Config::kProducerLag + 2;

/// Scales and biases of a tile's columns, for two works in turn, so that those of the next work may arrive while a
/// warpgroup still reads those of this one. `full` completes when they have arrived, `empty` when every consumer warp
/// has read them.
template <class Config>
struct ColumnScales {
  alignas(16) float scale[2][Config::kTileN];
  alignas(16) float bias[2][Config::kBias ? Config::kTileN : 4];
  cutlass::arch::ClusterTransactionBarrier full[2];
  cutlass::arch::ClusterBarrier empty[2];

  __device__ __forceinline__ void init() {
    for (int turn = 0; turn < 2; ++turn) {
      full[turn].init(1);
      empty[turn].init(4 * Config::kConsumers);
    }
  }

  /// Called by one thread: starts the copies for work `w`, whose columns begin at `column`. Places of columns beyond
  /// the matrix are not written.
  __device__ __forceinline__ void load(GemmParams const& p, int w, int column) {
    int const turn = w % 2, bytes = 4 * min(Config::kTileN, p.n - column);  // n is a multiple of 16
    empty[turn].wait(w / 2 % 2 ^ 1);
    full[turn].arrive_and_expect_tx(Config::kBias ? 2 * bytes : bytes);
    auto* barrier = reinterpret_cast<uint64_t*>(&full[turn]);
    cute::SM90_BULK_COPY_G2S::copy(p.scale.b + column, barrier, scale[turn], bytes);
    if constexpr (Config::kBias) {
      cute::SM90_BULK_COPY_G2S::copy(static_cast<float const*>(p.bias) + column, barrier, bias[turn], bytes);
    }
  }
  __device__ __forceinline__ void wait(int w) { full[w % 2].wait(w / 2 % 2); }

  /// Called by all threads of a warp: they have read what they need for work `w`.
  __device__ __forceinline__ void release(int w) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty[w % 2].arrive();
  }
};

struct NoColumnScales {};

/// Shared memory of a CTA. First the ring of Config::kStages k-blocks: `full` completes when the TMA has written a
/// stage, `empty` when every consumer warpgroup of every CTA that received the stage's B has read it.
template <class Config>
struct SharedStorage {
  static constexpr int kPackingA = Config::kSparse ? 2 : 1;
  static_assert(Config::kTileK * sizeof(typename Config::Element) == 128,
                "a k-block is 128 bytes of a row of B: the span of the swizzle");
  static_assert(Config::kStageBytesA == Config::kTileM * 128 / kPackingA &&
                    Config::kStageBytesB == Config::kTileN * 128,
                "the barrier of a stage expects just the bytes of its two tiles");
  static_assert(Config::kStageBytesA % (1024 / kPackingA) == 0 && Config::kStageBytesB % 1024 == 0,
                "a stage begins where the swizzle's pattern does");
  static_assert(Config::kStageBytesA + Config::kStageBytesB < 1 << 20, "a barrier counts fewer than 2^20 bytes");
  alignas(1024) uint8_t b[Config::kStages][Config::kStageBytesB];
  alignas(1024) uint8_t a[Config::kStages][Config::kStageBytesA];
  cutlass::arch::ClusterTransactionBarrier full[Config::kStages];
  cutlass::arch::ClusterBarrier empty[Config::kStages];
  Load loads[Config::kProducerWarpgroup ? 1 : kWorksAhead<Config>];  // by work number, modulo the size
  SharedPieces pieces[Config::kConsumers * 4];                       // one for each consumer warp
  cuda::std::conditional_t<Config::kScaled, ColumnScales<Config>, NoColumnScales> columns;
};

template <class Config>
__device__ __forceinline__ void init_barriers(SharedStorage<Config>& shared) {
  for (int s = 0; s < Config::kStages; ++s) {
    shared.full[s].init(1);  // the CTA's own producer
    shared.empty[s].init(Config::kConsumers * Config::kClusterM);
  }
  if constexpr (Config::kScaled) shared.columns.init();
  cutlass::arch::fence_barrier_init();
}

}  // namespace srelu24
