// mma m16n8k32 of 8-bit floats as the PTX ISA describes it.
#pragma once

#include <cutlass/numeric_types.h>

namespace emulator {
template <class A, class B>
struct Mma8 {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                  uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    of_lane(lane()) = {{a0, a1, a2, a3}, {b0, b1}};
    sync_warp();
    int const g = lane() / 4, t = lane() % 4;
    float c[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 32; ++k) {
        uint32_t const x = of_lane(4 * g + k % 16 / 4).a[k / 16 * 2 + i / 2];
        uint32_t const y = of_lane(4 * (2 * t + i % 2) + k % 16 / 4).b[k / 16];
        c[i] += A::value(x >> k % 4 * 8) * B::value(y >> k % 4 * 8);
      }
    }
    sync_warp();
    d0 = c[0], d1 = c[1], d2 = c[2], d3 = c[3];
  }
};
}  // namespace emulator

namespace cute {
using SM89_16x8x32_F32E4M3E4M3F32_TN = emulator::Mma8<cutlass::float_e4m3_t, cutlass::float_e4m3_t>;
using SM89_16x8x32_F32E4M3E5M2F32_TN = emulator::Mma8<cutlass::float_e4m3_t, cutlass::float_e5m2_t>;
}  // namespace cute
