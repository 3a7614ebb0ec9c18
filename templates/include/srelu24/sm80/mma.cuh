// The MMAs of a warp on operands in registers, and the E that sparse ones need besides.
#pragma once

#include <cutlass/arch/mma_sparse_sm80.h>
#include <cutlass/arch/mma_sparse_sm89.h>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm89.hpp>

#include <srelu24/metadata.cuh>
#include <srelu24/sm80/params.cuh>

namespace srelu24 {

/// The words of E that a thread feeds to its MMAs. For each strip it holds a 16-byte vector, which serves 256 of K:
/// kBlocks k-blocks, with kWords words each. A 16-bit MMA takes the word of the k-block from lanes t = 0, 1 for the
/// first 32 of its 64 columns and from 2, 3 for the others, as the MMA's selector says; an 8-bit one the word of its
/// step from all.
template <class Config, int Strips>
struct Metadata {
  using E = MetadataLayout;
  static constexpr int kBlocks = Config::kSparse ? E::kVectorColumns / Config::kTileK : 1, kWords = 4 / kBlocks;

  static_assert(!Config::kSparse || E::kVectorColumns % Config::kTileK == 0, "a vector of E serves whole k-blocks");

  uint4 const* source;
  uint4 vector[Strips];
  uint32_t word[Strips];  // of the current step
  int left;               // vectors after this one

  /// From row `first`, of a block of 64 in which all strips lie; k-blocks from `begin` to `end`.
  __device__ __forceinline__ Metadata(GemmParams const& p, int first, int begin, int end) {
    if constexpr (Config::kSparse) {
      E const layout(p.k);
      int64_t const block = min(first, p.m - 1) / 64;  // beyond M: of other rows, for results that are dropped
      // A strip of 16 rows is 32 threads of E.
      source = layout.vectors(p.metadata, block, begin / kBlocks) + first % 64 * 2 + threadIdx.x % 32;
      left = (end - begin - 1) / kBlocks;
      load();
    }
  }

  /// Goes on to `step` of k-block `q` of the vector. With a vector's last word the load of the next one begins.
  __device__ __forceinline__ void take(int q, int step) {
    if constexpr (Config::kSparse) {
      if (step >= kWords) return;
      int const w = q * kWords + step;
#pragma unroll
      for (int s = 0; s < Strips; ++s) {
        uint32_t const all[4] = {vector[s].x, vector[s].y, vector[s].z, vector[s].w};
        word[s] = all[w];
      }
      if (w == 3) {
        source += left > 0 ? E::kBlockVectors : 0;  // after the last one it is loaded again, and not used
        --left;
        load();
      }
    }
  }

  __device__ __forceinline__ static constexpr int selector(int step) { return kWords == 1 ? step : 0; }

 private:
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int s = 0; s < Strips; ++s) vector[s] = __ldg(source + E::thread(s, 0, 0));
  }
};

/// acc += the products of one item: in every strip 16 columns, or 8 under a sparse MMA.
template <class Config, int Strips, int Columns>
__device__ __forceinline__ void multiply(float (&acc)[Strips][Columns], uint32_t const (&a)[Strips][4],
                                         uint32_t const (&b)[4], Metadata<Config, Strips> const& e, int step,
                                         int item) {
  using Mma = typename Config::Mma;
#pragma unroll
  for (int s = 0; s < Strips; ++s) {
    if constexpr (Config::kSparse) {
      auto& sums = *reinterpret_cast<typename Mma::FragmentC*>(&acc[s][4 * item]);
      Mma{}(sums, reinterpret_cast<typename Mma::FragmentA const&>(a[s]),
            reinterpret_cast<typename Mma::FragmentB const&>(b), sums, e.word[s], e.selector(step));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const c = &acc[s][4 * (2 * item + half)];
        Mma::fma(c[0], c[1], c[2], c[3], a[s][0], a[s][1], a[s][2], a[s][3], b[2 * half], b[2 * half + 1], c[0], c[1],
                 c[2], c[3]);
      }
    }
  }
}

}  // namespace srelu24
