// Where a thread's part of the output lies, and 16-byte stores.
#pragma once

#include <cutlass/arch/memory.h>

#include <srelu24/sm90/params.cuh>

namespace srelu24 {

/// Where this thread's part of a warpgroup's 64 x kTileN block lies in the output.
struct BlockPosition {
  int row;     // first of this thread's two rows (the other is +8)
  int column;  // first column of the tile
  int block;   // row / 64 of the warpgroup's block
  int thread;  // in the warpgroup
};

__device__ __forceinline__ BlockPosition block_position(int first_row, int first_column) {
  int const thread = threadIdx.x % 128;
  return {first_row + thread / 32 * 16 + thread % 32 / 4, first_column, first_row / 64, thread};
}

__device__ __forceinline__ void store16(void* p, uint4 const& value, bool guard) {
  cutlass::arch::global_store<uint4, sizeof(uint4)>(value, p, guard);
}

}  // namespace srelu24
