// Where a thread's part of the output lies, in memory and among its accumulators; and 16-byte stores.
#pragma once

#include <cutlass/arch/memory.h>

#include <srelu24/metadata.cuh>
#include <srelu24/packed.cuh>

namespace srelu24 {

/// Where this thread's part of a 64 x kTileN block lies in the output.
struct BlockPosition {
  int row;     // first of this thread's two rows (the other is +8)
  int column;  // first of the kTileN columns
  int block;   // row / 64
  int thread;  // of the 128 that share the block: 32 * (row / 16 % 4) + lane
};

/// The index of the accumulator that holds, of the columns of the output that a thread has, number `column`, in row g
/// (`half` 0) or g + 8 (`half` 1). A thread has kTileN / 4 columns; its LoadOrder says which of the output they are.
__device__ __forceinline__ constexpr int accumulator_index(int column, int half) {
  return 4 * (column / 2) + 2 * half + column % 2;
}

__device__ __forceinline__ void store16(void* p, uint4 const& value, bool guard) {
  cutlass::arch::global_store<uint4, sizeof(uint4)>(value, p, guard);
}

}  // namespace srelu24
