// A tile whose K several CTAs share: their sums pass through global memory to the CTA with the last slice of K, which
// adds them in a fixed order and stores the result. CTAs of a tile are neighbours, and that one is the last of them: it
// waits only for CTAs before it.
#pragma once

#include <cutlass/barrier.h>

#include <srelu24/sm80/params.cuh>

namespace srelu24 {

/// First of the 256-wide units of K that slice `slice` takes.
__device__ __forceinline__ int first_unit(SplitKParams const& p, int slice) {
  return slice * p.units + min(slice, p.extra);
}

/// Where slice `slice` of tile `tile` leaves its sums: [accumulators of a thread / 4][Threads].
template <int Threads, int Accumulators>
__device__ __forceinline__ float4* partial_sums(SplitKParams const& p, int tile, int slice) {
  int64_t const slot = static_cast<int64_t>(tile) * (p.slices.divisor - 1) + slice;
  return p.partials + slot * (Accumulators / 4 * Threads) + threadIdx.x;
}

/// Leaves the sums of a slice for the CTA with the last one, or there adds all others. True where the sums are now
/// whole and this CTA has to store them.
template <int Threads, int Strips, int Columns>
__device__ __forceinline__ bool reduce(float (&acc)[Strips][Columns], SplitKParams const& p, int tile, int slice) {
  constexpr int kAccumulators = Strips * Columns;
  int const last = p.slices.divisor - 1;
  if (slice < last) {
    float4* const to = partial_sums<Threads, kAccumulators>(p, tile, slice);
#pragma unroll
    for (int i = 0; i < kAccumulators / 4; ++i) {
      float const* const x = &acc[4 * i / Columns][4 * i % Columns];
      __stcg(to + i * Threads, make_float4(x[0], x[1], x[2], x[3]));
    }
    cutlass::Barrier::arrive_inc(p.flags, threadIdx.x, tile);
    return false;
  }
  if (last > 0) cutlass::Barrier::wait_eq_reset(p.flags, threadIdx.x, tile, last);
#pragma unroll 1
  for (int other = last - 1; other >= 0; --other) {
    float4 const* const from = partial_sums<Threads, kAccumulators>(p, tile, other);
#pragma unroll
    for (int i = 0; i < kAccumulators / 4; ++i) {
      float4 const v = __ldcg(from + i * Threads);
      float* const x = &acc[4 * i / Columns][4 * i % Columns];
      x[0] += v.x, x[1] += v.y, x[2] += v.z, x[3] += v.w;
    }
  }
  return true;
}

}  // namespace srelu24
