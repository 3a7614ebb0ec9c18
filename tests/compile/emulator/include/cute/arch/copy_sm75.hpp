// ldmatrix.x4; stops at addresses that are not aligned or lie in the same banks.
#pragma once

#include <cuda_shim.h>

namespace cute {
struct uint128_t {
  uint32_t x[4];
};

struct SM75_U32x4_LDSM_N {
  static void copy(uint128_t const& row, uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3) {
    using namespace emulator;
    auto const number = [](void const* address) { return reinterpret_cast<uintptr_t>(address); };
    if (number(&row) % 16 != 0) fail("ldmatrix: an address is not a multiple of 16");
    of_lane(lane()).address = &row;
    sync_warp();
    uint32_t x[4];
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) banks |= 1u << number(of_lane(8 * m + r).address) / 16 % 8;
      if (banks != 0xff) fail("ldmatrix: rows of a matrix lie in the same banks");
      std::memcpy(&x[m], static_cast<char const*>(of_lane(8 * m + lane() / 4).address) + lane() % 4 * 4, 4);
    }
    sync_warp();
    x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
  }
};
}  // namespace cute
