// Transposes a 16-bit matrix, in tiles of 64 x 64 that pass through shared memory. A CTA of 256 threads does a tile.
#pragma once

#include <srelu24/sm90/params.cuh>

namespace srelu24 {

/// Sizes are multiples of 8 and rows 16-byte aligned, so a vector of 8 lies inside or outside as a whole.
__device__ __forceinline__ void transpose(TransposeParams const& p) {
  // Row r keeps its vector v at v ^ r / 8: eight lanes that read the same vector of rows 8 apart hit all banks.
  __shared__ uint4 tile[64][8];
  int const tiles = (p.n + 63) / 64, thread = threadIdx.x;
  int const row0 = blockIdx.x / tiles * 64, column0 = blockIdx.x % tiles * 64;

#pragma unroll
  for (int r = thread / 8; r < 64; r += 32) {
    int const v = thread % 8;
    if (row0 + r < p.m && column0 + 8 * v < p.n) {
      auto const* row = static_cast<uint16_t const*>(p.in) + (row0 + r) * p.in_stride + column0;
      tile[r][v ^ r / 8] = __ldcs(reinterpret_cast<uint4 const*>(row) + v);
    }
  }
  __syncthreads();

  // A thread turns rows 8 g .. 8 g + 7 of two columns into a vector of each.
  int const g = thread % 8, pair = thread / 8, column = column0 + 2 * pair;
  if (row0 + 8 * g >= p.m || column >= p.n) return;
  uint32_t x[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = reinterpret_cast<uint32_t const*>(&tile[8 * g + k][pair / 4 ^ g])[pair % 4];
  auto half = [&](uint32_t selector) {
    return make_uint4(__byte_perm(x[0], x[1], selector), __byte_perm(x[2], x[3], selector),
                      __byte_perm(x[4], x[5], selector), __byte_perm(x[6], x[7], selector));
  };
  auto* out = static_cast<uint16_t*>(p.out) + column * p.out_stride + row0;
  reinterpret_cast<uint4*>(out)[g] = half(0x5410);
  reinterpret_cast<uint4*>(out + p.out_stride)[g] = half(0x7632);
}

}  // namespace srelu24
