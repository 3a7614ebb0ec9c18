#pragma once

namespace cutlass {
struct FastDivmod {
  int divisor;
  unsigned multiplier, shift;
  void operator()(int& quotient, int& remainder, int dividend) const {
    quotient = dividend / divisor;
    remainder = dividend % divisor;
  }
};
}  // namespace cutlass
