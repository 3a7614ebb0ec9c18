// Dense [m, n] to packed 2:4: one warpgroup per 64 rows x 256 columns, all in registers.
#pragma once

#include <srelu24/metadata.cuh>
#include <srelu24/prune24.cuh>

namespace srelu24 {

/// Arguments, as srelu24/runtime/rows.py packs them. Input is [m, n].
struct SparsifyParams {
  void const* in;
  void* out;            // packed values [m, n / 2]
  uint4* out_metadata;  // [ceil(m / 64)][ceil(n / 256)][128]
  int64_t in_stride, out_stride;
  int32_t m, n;
};

template <class Element, class Activation>
__device__ __forceinline__ void sparsify24(SparsifyParams const& p) {
  using P = Packed<Element>;
  using E = MetadataLayout;
  int const vectors = E(p.n).column_blocks;
  int const block = blockIdx.x / vectors, vector = blockIdx.x % vectors;
  int const thread = threadIdx.x;
  int const row = 64 * block + thread / 32 * 16 + thread % 32 / 4;
  int const column = E::kVectorColumns * vector + thread % 4 * 16;
  auto const* in = static_cast<Element const*>(p.in);

  // All loads before the first use: 16 x 16 bytes in flight per thread.
  uint4 x[4][2][2];  // [64 columns][row half][8 columns]
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const c = column + 64 * q + 8 * i;
        int64_t const r = row + 8 * h;
        bool const inside = r < p.m && c < p.n;
        x[q][h][i] = inside ? __ldg(reinterpret_cast<uint4 const*>(in + r * p.in_stride + c)) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  uint32_t words[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t value[16];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t const low[4] = {x[q][0][i].x, x[q][0][i].y, x[q][0][i].z, x[q][0][i].w};
      uint32_t const high[4] = {x[q][1][i].x, x[q][1][i].y, x[q][1][i].z, x[q][1][i].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t const even = low_halves(low[c], high[c]), odd = high_halves(low[c], high[c]);
        value[8 * i + 2 * c] = Activation::template prepare<P>(even);
        value[8 * i + 2 * c + 1] = Activation::template prepare<P>(odd);
      }
    }
    uint4 kept_low, kept_high;
    words[q] = prune16<Element, Activation>(value, kept_low, kept_high);
    int const c = column + 64 * q;
    if (c < p.n) {
      auto* out = static_cast<Element*>(p.out) + static_cast<int64_t>(row) * p.out_stride + c / 2;
      if (row < p.m) *reinterpret_cast<uint4*>(out) = kept_low;
      if (row + 8 < p.m) *reinterpret_cast<uint4*>(out + 8 * p.out_stride) = kept_high;
    }
  }
  p.out_metadata[static_cast<int64_t>(blockIdx.x) * E::kBlockVectors + thread] =
      make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace srelu24
