#pragma once

namespace cutlass {
struct bfloat16_t {
  uint16_t bits;
};
}  // namespace cutlass
