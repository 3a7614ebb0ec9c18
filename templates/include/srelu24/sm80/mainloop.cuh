// Shared memory to accumulators: one warp's kWarpM x 64 part of the tile, in strips of 16 rows.
//
// An MMA takes 32 bytes of K of A, packed or not. The operands come from shared memory ahead of it: those of B by
// kAhead `items`, an item being what one ldmatrix brings (16 columns x 32 bytes of K; under a sparse MMA 8 columns x
// 64), those of A with the first of B. This goes on across k-blocks: behind the barrier between two of them the tensor
// cores have the MMAs of kAhead items to do while all warps load at once. The copies of a later k-block are spread over
// the steps.
#pragma once

#include <srelu24/sm80/mma.cuh>
#include <srelu24/sm80/tile_load.cuh>

namespace srelu24 {

/// What a warp computes: the first row and column of the CTA's tile, those of its own part in it, and k-blocks.
struct Part {
  int row, column, warp_row, warp_column;
  int k_begin, k_end;
};

template <class Config>
struct Mainloop {
  static constexpr int kStrips = Config::kWarpM / 16;
  static constexpr int kRowBytesA = Config::kSparse ? 64 : 128, kRowBytesB = 128;
  static constexpr int kPacking = Config::kSparse ? 2 : 1;
  static constexpr int kMmaBytesA = 32, kMmaBytesB = Config::kSparse ? 64 : 32;  // of K
  static constexpr int kSteps = kRowBytesB / kMmaBytesB;                         // of a k-block
  static constexpr int kItemColumns = Config::kSparse ? 8 : 16;
  static constexpr int kItems = Config::kWarpN / kItemColumns;  // of a step
  static constexpr int kSlots = 4, kAhead = kSlots - 1;         // of B in registers; there is room for no more
  static_assert(kItems % kSlots == 0, "the slots of B in registers take turns, and a step ends with the last of them");
  static constexpr int kStageBytesA = Config::kTileM * kRowBytesA, kStageBytesB = Config::kTileN * kRowBytesB;
  static constexpr int kStageBytes = kStageBytesA + kStageBytesB;
  using Element = typename Config::Element;
  static_assert(Config::kTileK * sizeof(Element) == kRowBytesB, "a k-block is 128 bytes of a row of B");
  using LoaderA = TileLoader<Config::kTileM, kRowBytesA, Config::kThreads, InOrder>;
  using LoaderB = TileLoader<Config::kTileN, kRowBytesB, Config::kThreads, Permuted<Config::kLoadOrder>>;
  static constexpr int kCopies = LoaderA::kCopies + LoaderB::kCopies;
  using E = Metadata<Config, kStrips>;
  using Accumulators = float[kStrips][Config::kWarpN / 2];

  GemmParams const& p;
  Part const& at;
  uint32_t const ring;  // in shared memory
  LoaderA from_a;
  LoaderB from_b;

  /// Starts the copies of the first k-blocks.
  __device__ __forceinline__ Mainloop(GemmParams const& params, Part const& part, uint32_t shared)
      : p(params),
        at(part),
        ring(shared),
        from_a(p.a, p.a_stride * sizeof(Element), p.m, at.row, bytes(at.k_begin) / kPacking,
               bytes(at.k_end) / kPacking),
        from_b(p.b, p.b_stride * sizeof(Element), p.n, at.column, bytes(at.k_begin), bytes(at.k_end)) {
#pragma unroll 1
    for (int s = 0; s < Config::kStages - 1; ++s) {
      copy(ring + s * kStageBytes, 0, kCopies);
      commit();
    }
  }

  /// accumulators += A B^T
  __device__ __forceinline__ void run(Accumulators& acc) {
    constexpr uint32_t kLast = (Config::kStages - 1) * kStageBytes;
    constexpr int kCopiesOfStep = (kCopies + kSteps - 1) / kSteps;
    int const lane = threadIdx.x % 32;
    uint32_t const lane_a = chunk_offset<kRowBytesA>(at.warp_row + lane % 16, lane / 16);
    uint32_t const lane_b =
        kStageBytesA + (Config::kSparse
                            ? chunk_offset<kRowBytesB>(at.warp_column + lane % 8, lane / 8)
                            : chunk_offset<kRowBytesB>(at.warp_column + lane / 16 * 8 + lane % 8, lane / 8 % 2));
    // A's operands of one MMA in every strip, and B's of one item. A step changes bits of the chunk that the lane does
    // not, so it is an exclusive or with the address.
    auto load_a = [&](uint32_t (&a)[kStrips][4], uint32_t stage, int step) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        load_matrices(a[s], ((stage + lane_a) ^ (step * kMmaBytesA)) + s * 16 * kRowBytesA);
      }
    };
    auto load_b = [&](uint32_t (&b)[4], uint32_t stage, int step, int item) {
      load_matrices(b, ((stage + lane_b) ^ (step * kMmaBytesB)) + item * kItemColumns * kRowBytesB);
    };

    uint32_t a[2][kStrips][4], b[kSlots][4];
    E e(p, at.row + at.warp_row, at.k_begin, at.k_end);
    uint32_t stage = ring, free_stage = ring + kLast;
    arrive();
    load_a(a[0], stage, 0);
#pragma unroll
    for (int item = 0; item < kAhead; ++item) load_b(b[item], stage, 0, item);
    for (int block = at.k_begin; block < at.k_end;) {
#pragma unroll
      for (int q = 0; q < E::kBlocks; ++q) {
        uint32_t const next = stage == ring + kLast ? ring : stage + kStageBytes;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          e.take(q, step);
#pragma unroll
          for (int item = 0; item < kItems; ++item) {
            int const later = item + kAhead, later_step = (step + later / kItems) % kSteps;
            bool const crosses = step == kSteps - 1 && later >= kItems;
            if (crosses && later == kItems) {
              commit();
              arrive();  // the next block; and all warps have read this one, its stage is free
            }
            if (later == kItems) load_a(a[(step + 1) % 2], crosses ? next : stage, later_step);
            load_b(b[later % kSlots], crosses ? next : stage, later_step, later % kItems);
            multiply<Config>(acc, a[step % 2], b[item % kSlots], e, step, item);
            if (item == 0) copy(free_stage, step * kCopiesOfStep, kCopiesOfStep);
          }
        }
        free_stage = stage;
        stage = next;
        if (++block == at.k_end) break;
      }
    }
    cute::cp_async_wait<0>();  // groups beyond the last k-block, which hold nothing
  }

 private:
  /// How many bytes of a row of B lie before k-block `block`.
  __device__ __forceinline__ int64_t bytes(int block) const {
    return min(static_cast<int64_t>(block) * Config::kTileK, static_cast<int64_t>(p.k)) * sizeof(Element);
  }

  /// Starts copies `first` to `first + count` of the next k-block that has not been copied.
  __device__ __forceinline__ void copy(uint32_t stage, int first, int count) const {
    from_a.copy(stage, first, count);
    from_b.copy(stage + kStageBytesA, max(first - LoaderA::kCopies, 0), first + count - max(first, LoaderA::kCopies));
  }

  /// Ends the copies of a k-block. Beyond the last one their group holds nothing; arrive() counts groups.
  __device__ __forceinline__ void commit() {
    cute::cp_async_fence();
    from_a.advance();
    from_b.advance();
  }

  /// Waits until the next k-block has arrived, for all warps. kStages - 1 k-blocks are in flight before.
  __device__ __forceinline__ static void arrive() {
    cute::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
  }
};

}  // namespace srelu24
