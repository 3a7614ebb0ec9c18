// Squares the kept r of a packed matrix to S in e4m3, each row scaled by its own largest value. One CTA does a row. E
// is the same for both and not touched.
#pragma once

#include <srelu24/scale.cuh>

namespace srelu24 {

/// Arguments of square_rows. Input is the kept r of a packed [m, n] in bf16, [m, n / 2].
struct SquareParams {
  void const* in;
  void* out;                  // e4m3 [m, n / 2]
  uint32_t const* r_largest;  // [m]
  float* s_scale;             // [m]
  int64_t in_stride, out_stride;
  int32_t m, n;
};

__device__ __forceinline__ void square_rows(SquareParams const& p) {
  constexpr int kAtOnce = 8;                       // vectors that a thread loads before it uses the first
  int const row = blockIdx.x, vectors = p.n / 16;  // of 8 kept values
  int const ends = (vectors + 1) / 2 * 2;          // rows of the output are padded to 16 bytes, with zeros
  auto const* in = reinterpret_cast<uint4 const*>(static_cast<cutlass::bfloat16_t const*>(p.in) + row * p.in_stride);
  auto* out = reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  float const r = __uint_as_float(__ldg(p.r_largest + row));
  float const largest = __fmul_rn(r, r);
  for (int first = threadIdx.x; first < ends; first += kAtOnce * blockDim.x) {
    uint4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int const v = first + i * blockDim.x;
      x[i] = v < vectors ? __ldcs(in + v) : uint4{};
    }
    float const inverse = inverse_scale_of(largest);  // here, so that no load waits for it
    auto four = [&](uint32_t low, uint32_t high) {
      float2 const a = scaled_squares(low, inverse), b = scaled_squares(high, inverse);
      return round_e4m3(a.x, a.y, b.x, b.y);
    };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int const v = first + i * blockDim.x;
      uint2 y = {four(x[i].x, x[i].y), four(x[i].z, x[i].w)};
      if (v >= vectors) y = {};  // padding, whatever the row's scale is
      if (v < ends) out[v] = y;
    }
  }
  if (threadIdx.x == 0) p.s_scale[row] = scale_of(largest);
}

}  // namespace srelu24
