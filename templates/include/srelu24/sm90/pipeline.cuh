// The shared-memory ring between the TMA and the tensor cores, and what else lies in shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include <srelu24/sm90/work.cuh>

namespace srelu24 {

/// A position in the ring and the parity its barriers have there.
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
  int row;       // first row of A
  int column;    // first row of B of this CTA's share
};

/// Works that a producer thread may know of, counted from the one its warpgroup multiplies: it has loaded at most
/// kStages - kProducerLag k-blocks ahead, each of which may be a work, and knows what it loads next.
template <class Config>
inline constexpr int kWorksAhead = Config::kStages - Config::kProducerLag + 2;

/// Ring of Config::kStages k-blocks. `full` completes when the TMA has written a stage, `empty` when every
/// consumer warpgroup of every CTA that received the stage's B has read it.
template <class Config>
struct SharedStorage {
  alignas(1024) uint8_t b[Config::kStages][Config::kStageBytesB];
  alignas(1024) uint8_t a[Config::kStages][Config::kStageBytesA];
  cutlass::arch::ClusterTransactionBarrier full[Config::kStages];
  cutlass::arch::ClusterBarrier empty[Config::kStages];
  Load loads[Config::kProducerWarpgroup ? 1 : kWorksAhead<Config>];  // by work number, modulo the size
  Pieces pieces[Config::kConsumers * 4];                             // one a warp
};

template <class Config>
__device__ __forceinline__ void init_barriers(SharedStorage<Config>& shared) {
  for (int s = 0; s < Config::kStages; ++s) {
    shared.full[s].init(1);  // the CTA's own producer
    shared.empty[s].init(Config::kConsumers * Config::kClusterM);
  }
  cutlass::arch::fence_barrier_init();
}

}  // namespace srelu24
