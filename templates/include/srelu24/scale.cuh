// Scales of 8-bit floats and the rounding to e4m3 (docs/fp8.md, "Scales"), shared by all kernels that quantise.
#pragma once

#include <srelu24/packed.cuh>

namespace srelu24 {

inline constexpr float kLargestE4m3 = 448.f;
/// Half way to the number that would come next: what is more saturates.
inline constexpr float kUnreachableE4m3 = 464.f;
/// Rows with a smaller largest magnitude are scaled as if it were this.
inline constexpr float kSmallestAmax = 0x1p-96f;

/// What a stored value stands for, given the largest magnitude its row has to hold. NaN passes.
__device__ __forceinline__ float scale_of(float largest) {
  return __fdiv_rn(largest < kSmallestAmax ? kSmallestAmax : largest, kLargestE4m3);
}

/// What a value is multiplied by before it is stored.
__device__ __forceinline__ float inverse_scale_of(float largest) {
  return __fdiv_rn(kLargestE4m3, largest < kSmallestAmax ? kSmallestAmax : largest);
}

/// Four floats to e4m3, nearest even, saturating; the first in the lowest byte.
__device__ __forceinline__ uint32_t round_e4m3(float a, float b, float c, float d) {
  uint32_t r;
  asm("{.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

/// r * r * inverse of two kept r in bf16, each operation rounded by itself.
__device__ __forceinline__ float2 scaled_squares(uint32_t r, float inverse) {
  using P = Packed<cutlass::bfloat16_t>;
  float const low = P::low(r), high = P::high(r);
  return {__fmul_rn(__fmul_rn(low, low), inverse), __fmul_rn(__fmul_rn(high, high), inverse)};
}

}  // namespace srelu24
