// Where E, the metadata of a packed matrix, lies in global memory: "fragment order" (docs/architecture.md, "The packed
// operand"). This is the only place that knows it.
//
// E is an array [ceil(rows / 64)][ceil(columns / 256)][128 threads][4 words], with `columns` those of the matrix before
// packing. Word q of thread 32 w + 4 g + t covers, in 16-bit kernels, columns 64 q + 16 t .. + 15 of row 16 w + g in
// its low half and of row 16 w + g + 8 in its high half. The four words of a thread are one 16-byte vector. (In 8-bit
// kernels two neighbouring threads have exchanged halves, docs/fp8.md; what is said here of addresses holds for both.)
//
// Some callers do the last additions themselves, on a block's number: the compiler orders the arithmetic as it finds
// it, and the kernels that have few registers to spare came out otherwise when it stood in a function.
#pragma once

#include <srelu24/packed.cuh>

namespace srelu24 {

/// E of a matrix of so many columns. A block of E is 64 rows x 256 columns; `row_block` is row / 64, `column_block` is
/// column / 256.
struct MetadataLayout {
  enum : int {             // no variables: NVRTC would put those into every binary
    kVectorColumns = 256,  // columns of the matrix before packing that one vector of E covers
    kWordColumns = 64,     // and those that one of its words covers
    kBlockVectors = 128,   // vectors of a block: one of each thread of a warpgroup
    kBlockWords = 512,     // words of a block: those of a thread begin at 4 * thread
  };

  int column_blocks;

  __device__ __forceinline__ explicit MetadataLayout(int columns)
      : column_blocks((columns + (kVectorColumns - 1)) / kVectorColumns) {}

  /// Number of a block. Its vectors begin at kBlockVectors times that, its words at kBlockWords times that.
  __device__ __forceinline__ int64_t block(int64_t row_block, int column_block) const {
    return row_block * column_blocks + column_block;
  }

  /// The vectors of a block of `e`, by thread.
  template <class Vector>
  __device__ __forceinline__ Vector* vectors(Vector* e, int64_t row_block, int column_block) const {
    return e + block(row_block, column_block) * kBlockVectors;
  }

  /// The thread of a block that holds row 16 * strip + g, where strip < 4 and g < 8, and columns 16 * t .. + 15 of
  /// every 64. It holds row 16 * strip + g + 8 as well.
  static __device__ __forceinline__ constexpr int thread(int strip, int g, int t) { return 32 * strip + 4 * g + t; }

  /// The word of a vector that covers `column`.
  static __device__ __forceinline__ int word(int column) { return column % kVectorColumns / kWordColumns; }
};

}  // namespace srelu24
