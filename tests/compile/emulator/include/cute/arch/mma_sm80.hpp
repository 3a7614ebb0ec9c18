// mma m16n8k16 as the PTX ISA describes it.
#pragma once

#include <cuda_shim.h>

namespace cute {
struct SM80_16x8x16_F32BF16BF16F32_TN {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                  uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    using namespace emulator;
    of_lane(lane()) = {{a0, a1, a2, a3}, {b0, b1}};
    sync_warp();
    int const g = lane() / 4, t = lane() % 4;
    float c[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 16; ++k) {
        uint32_t const x = of_lane(4 * g + k % 8 / 2).a[k / 8 * 2 + i / 2];
        uint32_t const y = of_lane(4 * (2 * t + i % 2) + k % 8 / 2).b[k / 8];
        c[i] += bf16(x, k % 2) * bf16(y, k % 2);
      }
    }
    sync_warp();
    d0 = c[0], d1 = c[1], d2 = c[2], d3 = c[3];
  }
};
}  // namespace cute
