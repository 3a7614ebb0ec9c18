// Two 16-bit values in one 32-bit register: row g in the low half, row g + 8 in the high half.
// The instructions differ between bfloat16 and half; everything else in the kernels does not.
#pragma once

#include <cutlass/numeric_types.h>

#include <cuda/std/cstdint>

namespace srelu24 {

using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uint8_t;

template <class Element>
struct Packed;

template <>
struct Packed<cutlass::bfloat16_t> {
  static constexpr uint32_t kInfinity = 0x7f807f80u;

  /// Round two floats to nearest even.
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  /// Round two floats to nearest even, then max(., 0). NaN becomes the canonical NaN.
  static __device__ __forceinline__ uint32_t round_relu(float low, float high) {
    uint32_t r;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  /// max(x, 0) of both halves; NaN stays NaN.
  static __device__ __forceinline__ uint32_t relu(uint32_t x) {
    uint32_t r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(0u));
    return r;
  }
  static __device__ __forceinline__ uint32_t square(uint32_t x) {
    uint32_t r;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %1;" : "=r"(r) : "r"(x));
#else  // x * x - 0 is the same number, rounded once, of the same sign
    asm("fma.rn.bf16x2 %0, %1, %1, %2;" : "=r"(r) : "r"(x), "r"(0x80008000u));
#endif
    return r;
  }
  static __device__ __forceinline__ float low(uint32_t x) { return __uint_as_float(x << 16); }
  static __device__ __forceinline__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
};

template <>
struct Packed<cutlass::half_t> {
  static constexpr uint32_t kInfinity = 0x7c007c00u;

  static __device__ __forceinline__ uint32_t round(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint32_t round_relu(float low, float high) {
    uint32_t r;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint32_t relu(uint32_t x) {
    uint32_t r;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(0u));
    return r;
  }
  static __device__ __forceinline__ uint32_t square(uint32_t x) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %1;" : "=r"(r) : "r"(x));
    return r;
  }
  static __device__ __forceinline__ float low(uint32_t x) {
    float r;
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;}" : "=f"(r) : "r"(x));
    return r;
  }
  static __device__ __forceinline__ float high(uint32_t x) {
    float r;
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;}" : "=f"(r) : "r"(x));
    return r;
  }
};

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

/// The low halves of x and y in one register, and the high halves in one: this undoes the pairing of rows g and g + 8.
__device__ __forceinline__ uint32_t low_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, 0x7632);
}

/// All ones in each 16-bit half where x >= y, else zeros; both halves below 2^15.
__device__ __forceinline__ uint32_t mask_ge(uint32_t x, uint32_t y) {
  // Bit 15 of x - y + 2^15 is set iff x >= y, and no half borrows from the other; then spread the bit.
  // (__byte_perm ignores the selector bit that replicates a sign.)
  uint32_t mask;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(mask) : "r"(x - y + 0x80008000u));
  return mask;
}

}  // namespace srelu24
