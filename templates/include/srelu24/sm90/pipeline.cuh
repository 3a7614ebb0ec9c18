// The shared-memory ring between the TMA and the tensor cores.
#pragma once

#include <cutlass/arch/barrier.h>

#include <srelu24/sm90/params.cuh>

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
};

/// What the producer loads next. One thread owns it; where registers are short it lies in shared memory, and
/// 16 bytes are one access.
struct alignas(16) NextLoad {
  int k;            // of the next k-block
  int row, column;  // first row of A, first row of B of this CTA's share
  uint8_t stage, phase;
  bool ragged;  // the share holds the end of B inside a block of rows
};

struct LoaderState {
  NextLoad load;
  int k_end;  // of the work; nothing is left to load once k has reached it
  int index;  // of the work
};

/// Ring of Config::kStages k-blocks. `full` completes when the TMA has written a stage, `empty` when every
/// consumer warpgroup of every CTA that received the stage's B has read it.
template <class Config>
struct SharedStorage {
  alignas(1024) uint8_t b[Config::kStages][Config::kStageBytesB];
  alignas(1024) uint8_t a[Config::kStages][Config::kStageBytesA];
  cutlass::arch::ClusterTransactionBarrier full[Config::kStages];
  cutlass::arch::ClusterBarrier empty[Config::kStages];
  LoaderState loader;
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
