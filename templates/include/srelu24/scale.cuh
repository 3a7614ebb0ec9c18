// Scales of 8-bit floats and the rounding to e4m3 (docs/fp8.md, "Scales"), shared by all kernels that quantise.
#pragma once

#include <srelu24/packed.cuh>

namespace srelu24 {

/// Scales of 8-bit operands and results (docs/fp8.md). A step is the distance from one row's scale to the next: 1, or 0
/// where one scale serves all rows.
struct ScaleParams {
  float const* a;                 // [m] or [1]
  float const* b;                 // [n]
  float const* s_inverse;         // gemm_relu2_24 to e4m3: what r * r is multiplied by, [m] or [1]
  uint32_t* r_largest;            // gemm_relu2_24 to bf16: bits of each row's largest r as a float [m]; zero at launch
  unsigned long long* saturated;  // gemm_relu2_24 to e4m3: a count of values that saturate, added to
  int32_t a_step, s_inverse_step;
};

inline constexpr float kLargestE4m3 = 448.f;
/// Half way from the largest number to the one that would come next: what is greater than this saturates.
inline constexpr float kUnreachableE4m3 = 464.f;
/// Rows with a smaller largest magnitude are scaled as if it were this.
inline constexpr float kSmallestAmax = 0x1p-96f;

/// By what a stored value is multiplied to give what it stands for, from the largest magnitude in its row. NaN gives
/// NaN.
__device__ __forceinline__ float scale_of(float largest) {
  return __fdiv_rn(largest < kSmallestAmax ? kSmallestAmax : largest, kLargestE4m3);
}

/// What a value is multiplied by before it is stored.
__device__ __forceinline__ float inverse_scale_of(float largest) {
  return __fdiv_rn(kLargestE4m3, largest < kSmallestAmax ? kSmallestAmax : largest);
}

/// r * r * inverse of two kept r in bf16, each operation rounded by itself.
__device__ __forceinline__ float2 scaled_squares(uint32_t r, float inverse) {
  using P = Packed<cutlass::bfloat16_t>;
  float const low = P::low(r), high = P::high(r);
  return {__fmul_rn(__fmul_rn(low, low), inverse), __fmul_rn(__fmul_rn(high, high), inverse)};
}

}  // namespace srelu24
