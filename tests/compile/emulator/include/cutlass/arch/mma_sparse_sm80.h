// mma.sp m16n8k32 as the PTX ISA describes it: which lane's registers hold which elements and metadata.
#pragma once

#include <cuda_shim.h>

namespace cutlass {
namespace gemm {
template <int, int, int>
struct GemmShape {};
}  // namespace gemm
namespace layout {
struct RowMajor {};
struct ColumnMajor {};
}  // namespace layout
namespace arch {
struct OpMultiplyAdd {};
enum class SPFormatType { Thread };

template <class, int, class, class, class, class, class, class, class, SPFormatType>
struct SparseMma {
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
    Lane& mine = of_lane(lane());
    std::memcpy(mine.a, a.x, 16);
    std::memcpy(mine.b, b.x, 16);
    mine.e = e;
    sync_warp();
    int const g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
      int const high_row = i / 2, column = 2 * t + i % 2;
      float sum = c.x[i];
      for (int packed = 0; packed < 16; ++packed) {  // two kept of every four of 32
        uint32_t const word = of_lane(4 * g + 2 * selector + packed / 8).e >> 16 * high_row;
        int const k = packed / 2 * 4 + (word >> packed % 8 * 2 & 3);
        uint32_t const x = of_lane(4 * g + packed % 8 / 2).a[packed / 8 * 2 + high_row];
        uint32_t const y = of_lane(4 * column + k % 8 / 2).b[k / 8];
        sum += bf16(x, packed % 2) * bf16(y, k % 2);
      }
      d.x[i] = sum;
    }
    sync_warp();
  }
};
}  // namespace arch
}  // namespace cutlass
