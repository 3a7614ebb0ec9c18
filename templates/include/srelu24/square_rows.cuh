// The kept r of a packed matrix to S in e4m3, each row scaled by its own largest value. One CTA a row. E stays.
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
  int const row = blockIdx.x, kept = p.n / 2;  // a multiple of 8; rows are padded to 16 bytes on both sides
  auto const* in = reinterpret_cast<uint4 const*>(static_cast<cutlass::bfloat16_t const*>(p.in) + row * p.in_stride);
  auto* out = reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  float const r = __uint_as_float(__ldg(p.r_largest + row));
  float const largest = __fmul_rn(r, r), inverse = inverse_scale_of(largest);
  if (threadIdx.x == 0) p.s_scale[row] = scale_of(largest);

  auto four = [&](uint32_t x, uint32_t y) {
    float2 const a = scaled_squares(x, inverse), b = scaled_squares(y, inverse);
    return round_e4m3(a.x, a.y, b.x, b.y);
  };
  for (int i = threadIdx.x; 16 * i < kept; i += blockDim.x) {
    uint4 const a = __ldg(in + 2 * i);
    uint4 y = {four(a.x, a.y), four(a.z, a.w), 0, 0};  // padding is zero, whatever the row's scale is
    if (16 * i + 8 < kept) {
      uint4 const b = __ldg(in + 2 * i + 1);
      y.z = four(b.x, b.y);
      y.w = four(b.z, b.w);
    }
    out[i] = y;
  }
}

}  // namespace srelu24
