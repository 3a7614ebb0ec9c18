// Global to shared memory: a CTA's tiles of A and B, one k-block at a time, 16 bytes a cp.async.
//
// A row of a k-block is kRowBytes in shared memory: 128 (64 elements), or 64 (32 packed values of A). Its 16-byte
// chunks are permuted by an exclusive or with the row, so that the eight rows an ldmatrix reads at one k lie in
// different banks. Rows of B lie in the kernel's LoadOrder; what is outside of the matrices is zero.
#pragma once

#include <srelu24/load_order.cuh>
#include <srelu24/sm80/cp_async.cuh>
#include <srelu24/sm80/params.cuh>

namespace srelu24 {

/// Byte offset of 16-byte chunk `chunk` of row `row` in a tile.
template <int RowBytes>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(RowBytes == 128 || RowBytes == 64);
  int const turn = RowBytes == 128 ? row % 8 : row / 2 % 4;  // 8 rows of 128 bytes, or 2 x 4 of 64, are all banks
  return row * RowBytes + (chunk ^ turn) * 16;
}

/// The row of B that lies at row `r` of its tile (load_order.cuh). A permutation of the bits of r.
template <LoadOrder Order>
__device__ __forceinline__ constexpr int row_of_b(int r) {
  constexpr int kBlock = Order == LoadOrder::kOwn16 ? 64 : 32;
  return r / kBlock * kBlock + r % 8 / 2 * (kBlock / 4) + r % kBlock / 8 * 2 + r % 2;
}

/// Loads one operand's tile of 16-bit elements: this thread's chunks are one of a row, and the same one of every kStep-th
/// row after it.
template <class Element, int Rows, int RowBytes, int Threads>
struct TileLoader {
  static constexpr int kChunks = RowBytes / 16, kStep = Threads / kChunks;
  static_assert(sizeof(Element) == 2 && Rows % kStep == 0 && kStep % 16 == 0);

  /// The k-block of `matrix` [rows, width] that begins at row `first_row` and element `first`. `place(r)` is the row,
  /// from first_row, that goes to row r of the tile: a permutation of the bits of r.
  template <class Place>
  static __device__ __forceinline__ void load(uint32_t tile, void const* matrix, int64_t stride, int rows, int width,
                                              int first_row, int first, Place const& place) {
    int const row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    int const element = first + 8 * chunk, bytes = 2 * min(max(width - element, 0), 8);
    int const start = first_row + place(row);
    auto const* const source = static_cast<Element const*>(matrix) + start * stride + element;
    uint32_t const destination = tile + chunk_offset<RowBytes>(row, chunk);
#pragma unroll
    for (int r = 0; r < Rows; r += kStep) {
      int const further = place(r);
      copy16(destination + r * RowBytes, source + further * stride, start + further < rows ? bytes : 0);
    }
  }
};

}  // namespace srelu24
