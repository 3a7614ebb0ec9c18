// Stream-K: partial sums of a tile that several clusters share pass through global memory. The cluster with
// the tile's last k-blocks owns it, adds the others' sums in a fixed order and stores the result: results do not
// change from run to run, but they do depend on where in the output a tile lies.
//
// An owner waits only for clusters before it, and a cluster gives its piece of the later tile before it waits for
// the earlier one. So nobody waits for a cluster that has not been scheduled yet, even when other kernels hold
// multiprocessors, and waits do not chain.
#pragma once

#include <cutlass/arch/barrier.h>

#include <srelu24/sm90/work.cuh>

namespace srelu24 {

/// One consumer warpgroup's place in the workspace.
template <class Config>
struct PartialSlot {
  static constexpr int kVectors = Config::kTileN / 8;  // float4s that a thread's accumulators are
  SplitParams const& split;
  int const index, barrier;

  __device__ __forceinline__ PartialSlot(SplitParams const& s, int cluster, int cta, int consumer)
      : split(s), index((cluster * Config::kClusterM + cta) * Config::kConsumers + consumer), barrier(consumer) {}

  __device__ __forceinline__ float4* vectors() const {
    return split.partials + static_cast<int64_t>(index) * kVectors * 128 + threadIdx.x % 128;
  }

  /// Leave these sums for the tile's owner.
  __device__ __forceinline__ void put(float (&acc)[Config::kTileN / 2]) const {
    float4* const p = vectors();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      __stcg(p + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    }
    cutlass::arch::NamedBarrier::sync(128, barrier);
    if (threadIdx.x % 128 == 0) {  // its release covers what the others wrote before the barrier
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(split.flags + index) : "memory");
    }
  }

  /// Wait for another cluster's sums and add them.
  __device__ __forceinline__ void add_to(float (&acc)[Config::kTileN / 2]) const {
    if (threadIdx.x % 128 == 0) {
      uint32_t ready = 0;
      while (ready == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(split.flags + index));
      split.flags[index] = 0;  // only one cluster reads this slot; the next launch needs the flag at zero again
    }
    cutlass::arch::NamedBarrier::sync(128, barrier);
    float4 const* const p = vectors();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float4 const v = __ldcg(p + i * 128);
      acc[4 * i] += v.x;
      acc[4 * i + 1] += v.y;
      acc[4 * i + 2] += v.z;
      acc[4 * i + 3] += v.w;
    }
  }
};

/// Hands the sums of a piece of a tile to its owner, or as the owner adds the others'. True where the sums are now
/// whole and this cluster has to store them.
template <class Config>
__device__ __forceinline__ bool reduce(float (&acc)[Config::kTileN / 2], GemmParams const& p, Piece const& piece,
                                       int cta, int consumer) {
  int const cluster = blockIdx.x / Config::kClusterM;
  if (piece.k_end < p.k_blocks) {
    PartialSlot<Config>(p.split, cluster, cta, consumer).put(acc);
    return false;
  }
  if (piece.k_begin > 0) {  // then the piece starts where this cluster's share does
    int const tile_begin = first_unit(p.split, cluster) - piece.k_begin / kVectorBlocks<Config>;
    for (int other = cluster - 1; other >= 0 && first_unit(p.split, other + 1) > tile_begin; --other) {
      PartialSlot<Config>(p.split, other, cta, consumer).add_to(acc);
    }
  }
  return true;
}

}  // namespace srelu24
