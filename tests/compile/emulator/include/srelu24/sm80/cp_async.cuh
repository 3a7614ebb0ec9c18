// cp.async: a copy lands when its group is waited for, and no earlier.
#pragma once

#include <cuda_shim.h>
#include <srelu24/packed.cuh>

namespace srelu24 {
extern uint8_t ring[];
}

namespace emulator {
struct Copy {
  uint32_t shared;
  void const* global;
  int bytes;
};
inline thread_local std::vector<std::vector<Copy>> groups(1);
}  // namespace emulator

namespace cute {
inline uint32_t cast_smem_ptr_to_uint(void const* p) {
  return static_cast<uint32_t>(static_cast<uint8_t const*>(p) - srelu24::ring);
}
inline void cp_async_fence() {
  emulator::groups.emplace_back();
}

template <int Pending>
void cp_async_wait() {
  auto& groups = emulator::groups;
  for (; static_cast<int>(groups.size()) - 1 > Pending; groups.erase(groups.begin())) {
    for (emulator::Copy const& copy : groups.front()) {
      uint8_t bytes[16] = {};
      if (copy.bytes > 0) std::memcpy(bytes, copy.global, copy.bytes);
      std::memcpy(srelu24::ring + copy.shared, bytes, 16);
    }
  }
}
}  // namespace cute

namespace srelu24 {
inline void copy16(uint32_t shared, void const* global, int bytes) {
  emulator::groups.back().push_back({shared, global, bytes});
}
}  // namespace srelu24
