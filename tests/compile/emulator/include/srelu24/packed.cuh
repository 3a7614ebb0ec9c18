// The two-in-a-register arithmetic of packed.cuh in plain C++, for bfloat16 and finite numbers.
#pragma once

#include <cuda_shim.h>
#include <cutlass/numeric_types.h>

namespace srelu24 {
template <class Element>
struct Packed {
  static constexpr uint32_t kInfinity = 0x7f807f80u;
  static uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits + 0x7fff + (bits >> 16 & 1) >> 16;
  }
  static uint32_t round(float low, float high) { return rounded(low) | rounded(high) << 16; }
  static uint32_t round_relu(float low, float high) { return round(max(low, 0.f), max(high, 0.f)); }
  static float low(uint32_t x) { return emulator::bf16(x, 0); }
  static float high(uint32_t x) { return emulator::bf16(x, 1); }
  static uint32_t square(uint32_t x) { return round(low(x) * low(x), high(x) * high(x)); }
};

inline uint32_t round_e4m3(float a, float b, float c, float d) {
  uint32_t bytes = 0;
  for (float x : {d, c, b, a}) {
    uint32_t nearest = 0;  // of the numbers that are not negative, of two as near the even one
    for (uint32_t y = 1; y < 0x7f; ++y) {
      float const here = std::abs(cutlass::float_e4m3_t::value(y) - std::abs(x));
      float const best = std::abs(cutlass::float_e4m3_t::value(nearest) - std::abs(x));
      if (here < best || (here == best && y % 2 == 0)) nearest = y;
    }
    bytes = bytes << 8 | nearest | (std::signbit(x) ? 0x80 : 0);
  }
  return bytes;
}

inline uint32_t low_halves(uint32_t x, uint32_t y) {
  return (x & 0xffff) | y << 16;
}
inline uint32_t high_halves(uint32_t x, uint32_t y) {
  return x >> 16 | (y & 0xffff0000u);
}
inline uint32_t mask_ge(uint32_t x, uint32_t y) {
  return by_halves(x, y, [](uint32_t a, uint32_t b) { return a >= b ? 0xffff : 0; });
}
}  // namespace srelu24
