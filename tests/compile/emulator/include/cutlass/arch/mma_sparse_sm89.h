// mma.sp m16n8k64 of 8-bit floats as the PTX ISA describes it: every lane's word of metadata counts.
#pragma once

#include <cutlass/arch/mma_sparse_sm80.h>

namespace cutlass::arch {
template <class A, class LayoutA, class B, class LayoutB, class LayoutC, class Operator>
struct SparseMma<gemm::GemmShape<16, 8, 64>, 32, A, LayoutA, B, LayoutB, float, LayoutC, Operator,
                 SPFormatType::Thread> {
  struct FragmentA {
    uint32_t x[4];
  };
  using FragmentB = FragmentA;
  struct FragmentC {
    float x[4];
  };

  void operator()(FragmentC& d, FragmentA const& a, FragmentB const& b, FragmentC const& c, uint32_t e,
                  int selector) const {
    using namespace emulator;
    if (selector != 0) fail("mma.sp m16n8k64: the selector is 0");
    Lane& mine = of_lane(lane());
    std::memcpy(mine.a, a.x, 16);
    std::memcpy(mine.b, b.x, 16);
    mine.e = e;
    sync_warp();
    int const g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
      int const high_row = i / 2, column = 2 * t + i % 2;
      float sum = c.x[i];
      for (int packed = 0; packed < 32; ++packed) {  // two kept of every four of 64
        uint32_t const word = of_lane(4 * g + packed / 16 * 2 + high_row).e;
        int const k = packed / 2 * 4 + (word >> packed % 16 * 2 & 3);
        uint32_t const x = of_lane(4 * g + packed % 16 / 4).a[packed / 16 * 2 + high_row];
        uint32_t const y = of_lane(4 * column + k % 16 / 4).b[k / 16];
        sum += A::value(x >> packed % 4 * 8) * B::value(y >> k % 4 * 8);
      }
      d.x[i] = sum;
    }
    sync_warp();
  }
};
}  // namespace cutlass::arch
