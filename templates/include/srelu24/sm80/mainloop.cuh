// Shared memory to accumulators: one warp's kWarpM x 64 part of the tile, in strips of 16 rows.
//
// The operands of an MMA come from shared memory just ahead of it: those of B one `item` ahead, an item being what one
// ldmatrix brings (16 columns x 16 of K; under a sparse MMA 8 columns x 32), those of A one K of an MMA ahead. This goes
// on across k-blocks, so the tensor cores find work on both sides of the barrier between two of them.
#pragma once

#include <cutlass/arch/mma_sparse_sm80.h>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include <srelu24/sm80/tile_load.cuh>

namespace srelu24 {

/// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint8_t const* row) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<cute::uint128_t const*>(row), x[0], x[1], x[2], x[3]);
}

template <class Config>
struct Mainloop {
  static constexpr int kStrips = Config::kWarpM / 16;
  static constexpr int kRowBytesA = Config::kSparse ? 64 : 128, kRowBytesB = 128;
  static constexpr int kMmaK = Config::kSparse ? 32 : 16;
  static constexpr int kSteps = Config::kTileK / kMmaK;  // of a k-block
  static constexpr int kItemColumns = Config::kSparse ? 8 : 16;
  static constexpr int kItems = Config::kWarpN / kItemColumns;  // of a step
  static constexpr int kStageBytesA = Config::kTileM * kRowBytesA, kStageBytesB = Config::kTileN * kRowBytesB;
  static constexpr int kStageBytes = kStageBytesA + kStageBytesB;
  using Element = typename Config::Element;
  using Accumulators = float[kStrips][Config::kWarpN / 2];

  GemmParams const& p;
  uint8_t* const shared;            // the ring
  int const row, column;            // first of the CTA's tile
  int const warp_row, warp_column;  // first of the warp's part, in the tile
  int const lane = threadIdx.x % 32;

  /// accumulators += A B^T
  __device__ __forceinline__ void run(Accumulators& acc) const {
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; ++s) load(s, s);
    arrive();
    uint32_t a[2][kStrips][4], b[2][4];
    Metadata e(*this);
    int stage = 0, free_stage = Config::kStages - 1;
    load_a(a[0], stage, 0);
    load_b(b[0], stage, 0, 0);
    for (int block = 0; block < p.k_blocks; ++block) {
      int const next = stage + 1 == Config::kStages ? 0 : stage + 1;
      e.advance(block);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
          bool const last_of_step = item == kItems - 1, last = last_of_step && step == kSteps - 1;
          if (last) arrive();  // the next block; and all warps have read this one, its stage is free
          if (last_of_step) load_a(a[(step + 1) % 2], last ? next : stage, (step + 1) % kSteps);
          load_b(b[(item + 1) % 2], last ? next : stage, last_of_step ? (step + 1) % kSteps : step,
                 last_of_step ? 0 : item + 1);
          multiply(acc, a[step % 2], b[item % 2], e, step, item);
          if (step == 0 && item == 0) load(block + Config::kStages - 1, free_stage);
        }
      }
      free_stage = stage;
      stage = next;
    }
    cute::cp_async_wait<0>();  // of the groups that hold nothing
  }

 private:
  /// Ask for k-block `block`; beyond the last one an empty group, so that arrive() can count groups.
  __device__ __forceinline__ void load(int block, int stage) const {
    if (block < p.k_blocks) {
      uint32_t const ring = cute::cast_smem_ptr_to_uint(shared) + stage * kStageBytes;
      constexpr int kPacking = Config::kSparse ? 2 : 1;
      int const first = block * Config::kTileK;
      TileLoader<Element, Config::kTileM, kRowBytesA, Config::kThreads>::load(
          ring, p.a, p.a_stride, p.m, p.k / kPacking, row, first / kPacking, [](int r) { return r; });
      TileLoader<Element, Config::kTileN, kRowBytesB, Config::kThreads>::load(
          ring + kStageBytesA, p.b, p.b_stride, p.n, p.k, column, first, row_of_b<Config::kLoadOrder>);
    }
    cute::cp_async_fence();
  }

  /// Wait until the next k-block is there, for all warps. kStages - 1 blocks are on their way.
  __device__ __forceinline__ static void arrive() {
    cute::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
  }

  /// A's operands of one MMA in every strip: rows 0..7, 8..15 and 8 values further on.
  __device__ __forceinline__ void load_a(uint32_t (&a)[kStrips][4], int stage, int step) const {
    uint8_t const* const tile = shared + stage * kStageBytes;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      int const r = warp_row + 16 * s + lane % 16;
      load_matrices(a[s], tile + chunk_offset<kRowBytesA>(r, 2 * step + lane / 16));
    }
  }

  /// B's operands of one item: two times 8 columns x 16 of K, or 8 columns x 32 of K.
  __device__ __forceinline__ void load_b(uint32_t (&b)[4], int stage, int step, int item) const {
    uint8_t const* const tile = shared + stage * kStageBytes + kStageBytesA;
    int const matrix = lane / 8, n = Config::kSparse ? 0 : matrix / 2 * 8, k = Config::kSparse ? matrix : matrix % 2;
    int const r = warp_column + item * kItemColumns + n + lane % 8;
    load_matrices(b, tile + chunk_offset<kRowBytesB>(r, step * (kMmaK / 8) + k));
  }

  /// The words of E that a thread feeds to the MMAs of a k-block, one a strip: word q of its vector for k-block 4i + q.
  /// Lanes t = 0, 1 serve the first 32 of the block's 64 columns, 2 and 3 the others; the MMA's selector says which.
  struct Metadata {
    uint4 const* source;
    uint4 vector[kStrips];  // the words after this one
    uint32_t word[kStrips];
    int const vectors;

    __device__ __forceinline__ explicit Metadata(Mainloop const& m) : vectors((m.p.k + 255) / 256) {
      if constexpr (Config::kSparse) {
        int const first = m.row + m.warp_row;              // all strips of a warp lie in one block of 64 rows
        int64_t const block = min(first, m.p.m - 1) / 64;  // beyond M: of other rows, for results that are dropped
        source = m.p.metadata + block * vectors * 128 + first % 64 * 2 + m.lane;
        load();
      }
    }

    __device__ __forceinline__ void load() {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) vector[s] = __ldg(source + 32 * s);
    }

    /// On to k-block `block`. With a vector's last word the next vector is asked for: it has a k-block's time to arrive.
    __device__ __forceinline__ void advance(int block) {
      if constexpr (Config::kSparse) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          word[s] = vector[s].x;
          vector[s] = {vector[s].y, vector[s].z, vector[s].w, 0};
        }
        if (block % 4 == 3 && block / 4 + 1 < vectors) {
          source += 128;
          load();
        }
      }
    }
  };

  __device__ __forceinline__ static void multiply(Accumulators& acc, uint32_t const (&a)[kStrips][4],
                                                  uint32_t const (&b)[4], Metadata const& e, int step, int item) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if constexpr (Config::kSparse) {
        sparse_mma(&acc[s][4 * item], a[s], b, e.word[s], step);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const c = &acc[s][4 * (2 * item + half)];
          Config::Mma::fma(c[0], c[1], c[2], c[3], a[s][0], a[s][1], a[s][2], a[s][3], b[2 * half], b[2 * half + 1],
                           c[0], c[1], c[2], c[3]);
        }
      }
    }
  }

  /// Packed 16 x 16 (of 16 x 32) times 32 x 8. `selector`: which pair of each four lanes gives the metadata.
  __device__ __forceinline__ static void sparse_mma(float* c, uint32_t const (&a)[4], uint32_t const (&b)[4],
                                                    uint32_t e, int selector) {
    using Mma = cutlass::arch::SparseMma<cutlass::gemm::GemmShape<16, 8, 32>, 32, Element, cutlass::layout::RowMajor,
                                         Element, cutlass::layout::ColumnMajor, float, cutlass::layout::RowMajor,
                                         cutlass::arch::OpMultiplyAdd, cutlass::arch::SPFormatType::Thread>;
    auto& sums = *reinterpret_cast<typename Mma::FragmentC*>(c);
    Mma{}(sums, reinterpret_cast<typename Mma::FragmentA const&>(a),
          reinterpret_cast<typename Mma::FragmentB const&>(b), sums, e, selector);
  }
};

}  // namespace srelu24
