#pragma once

#include <cuda_shim.h>

#include <cmath>

namespace cutlass {
struct bfloat16_t {
  uint16_t bits;
};

/// An 8-bit float with so many bits of exponent; NaN and infinity are of no use in a test.
template <int Exponent>
struct Float8 {
  uint8_t bits;

  static float value(uint32_t x) {
    constexpr int kMantissa = 7 - Exponent, kBias = (1 << (Exponent - 1)) - 1;
    int const exponent = x >> kMantissa & ((1 << Exponent) - 1), fraction = x & ((1 << kMantissa) - 1);
    float const magnitude = exponent ? std::ldexp(fraction + (1 << kMantissa), exponent - kBias - kMantissa)
                                     : std::ldexp(fraction, 1 - kBias - kMantissa);
    return x & 0x80 ? -magnitude : magnitude;
  }
};
using float_e4m3_t = Float8<4>;
using float_e5m2_t = Float8<5>;
}  // namespace cutlass
