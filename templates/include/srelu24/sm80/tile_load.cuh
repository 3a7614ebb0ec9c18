// Global to shared memory: a CTA's tiles of A and B, one k-block at a time, 16 bytes a cp.async.
//
// A row of a k-block is kRowBytes in shared memory: 128, or 64 of packed A. Its 16-byte chunks are permuted by an
// exclusive or with the row, so that the eight rows an ldmatrix reads at one k lie in different banks. Rows of B lie in
// the kernel's LoadOrder. What is beyond K is zero; rows beyond M or N are not loaded: what comes of them is not
// stored.
#pragma once

#include <srelu24/load_order.cuh>
#include <srelu24/sm80/params.cuh>
#include <srelu24/sm80/shared_memory.cuh>

namespace srelu24 {

/// Byte offset of 16-byte chunk `chunk` of row `row` in a tile. Chunks that differ in a bit lie at offsets that do.
template <int RowBytes>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(RowBytes == 128 || RowBytes == 64, "a row of a k-block is 128 bytes, or 64 of packed A");
  int const turn = RowBytes == 128 ? row % 8 : row / 2 % 4;  // 8 rows of 128 bytes, or 2 x 4 of 64, are all banks
  return row * RowBytes + (chunk ^ turn) * 16;
}

/// Rows of A lie in their own order.
struct InOrder {
  static __device__ __forceinline__ constexpr int place(int r) { return r; }
};

/// The row of B that lies at row `r` of its tile (load_order.cuh). A permutation of the bits of r.
template <LoadOrder Order>
struct Permuted {
  static __device__ __forceinline__ constexpr int place(int r) {
    constexpr int kBlock = Order == LoadOrder::kOwn16 ? 64 : 32;
    return r / kBlock * kBlock + r % 8 / 2 * (kBlock / 4) + r % kBlock / 8 * 2 + r % 2;
  }
};

/// This thread's part of one operand's tiles: a chunk of every kStep-th row, kCopies in all.
template <int Rows, int RowBytes, int Threads, class RowOrder>
struct TileLoader {
  static constexpr int kChunks = RowBytes / 16, kStep = Threads / kChunks, kCopies = Rows / kStep;
  static_assert(Rows % kStep == 0, "all threads copy equally many rows");
  static_assert(kStep % 16 == 0, "rows a step apart have their chunks in the same places");

  uint8_t const* source;       // its chunk of the first of its rows, in the next k-block
  int left;                    // from there to the end of what is loaded of a row, in 8 bytes
  int const rows;              // from its first row to the end of the matrix
  uint32_t const stride;       // 16 bytes between rows
  uint32_t const destination;  // of that chunk, from the tile's start

  /// Loads from `matrix` of `matrix_rows` rows: a tile's rows begin at `first_row`, and of each row it takes the bytes
  /// [begin, end), a k-block at a time.
  __device__ __forceinline__ TileLoader(void const* matrix, int64_t stride_bytes, int matrix_rows, int first_row,
                                        int64_t begin, int64_t end)
      : source(static_cast<uint8_t const*>(matrix) + (first_row + row()) * stride_bytes + begin + 16 * chunk()),
        left(static_cast<int>((end - begin) / 8) - 2 * chunk()),
        rows(matrix_rows - first_row - row()),
        stride(static_cast<uint32_t>(stride_bytes / 16)),
        destination(chunk_offset<RowBytes>(threadIdx.x / kChunks, chunk())) {}

  /// Starts this thread's copies number `first` to `first + count` (of kCopies) of the next k-block, into the tile at
  /// `tile`. Beyond the last k-block it copies nothing.
  __device__ __forceinline__ void copy(uint32_t tile, int first, int count) const {
    int const limit = left > -2 * chunk() ? rows : 0;
#pragma unroll
    for (int i = first; i < min(first + count, kCopies); ++i) {
      int const further = RowOrder::place(i * kStep);
      uint32_t const to = tile + destination + i * kStep * RowBytes;
      void const* const from = address(source, stride, 16 * further);
      if constexpr (RowBytes == 64) {  // packed values may end after half a chunk
        copy_first(to, from, 8 * min(max(left, 0), 2), further < limit);
      } else {
        copy16(to, from, left <= 0, further < limit);
      }
    }
  }

  /// Goes on to the next k-block.
  __device__ __forceinline__ void advance() {
    source += RowBytes;
    left -= RowBytes / 8;
  }

 private:
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks; }
  static __device__ __forceinline__ int row() { return RowOrder::place(threadIdx.x / kChunks); }
};

}  // namespace srelu24
