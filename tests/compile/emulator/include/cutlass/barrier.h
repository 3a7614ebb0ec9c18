// CTAs run one after the other: what one waits for is there.
#pragma once

#include <cuda_shim.h>

namespace cutlass {
struct Barrier {
  static void arrive_inc(int32_t* flags, int thread, int flag) {
    __syncthreads();
    if (thread == 0) ++flags[flag];
  }
  static void wait_eq_reset(int32_t* flags, int thread, int flag, int value) {
    if (thread == 0) {
      if (flags[flag] != value) emulator::fail("a CTA would wait for one that has not run");
      flags[flag] = 0;
    }
    __syncthreads();
  }
};
}  // namespace cutlass
