// cp.async: a copy lands when its group is waited for, and no earlier. ldmatrix.x4: stops at addresses that are not
// aligned or lie in the same banks.
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
inline void copy_first(uint32_t shared, void const* global, int bytes, bool there) {
  if (there) emulator::groups.back().push_back({shared, global, bytes});
}
inline void copy16(uint32_t shared, void const* global, bool zero, bool there) {
  copy_first(shared, global, zero ? 0 : 16, there);
}
inline void const* address(void const* p, uint32_t a, uint32_t b) {
  return static_cast<char const*>(p) + static_cast<uint64_t>(a) * b;
}
inline uint32_t unknown(uint32_t x) {
  return x;
}

inline void load_matrices(uint32_t (&x)[4], uint32_t row) {
  using namespace emulator;
  if (row % 16 != 0) fail("ldmatrix: an address is not a multiple of 16");
  of_lane(lane()).address = ring + row;
  sync_warp();
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      banks |= 1u << (static_cast<uint8_t const*>(of_lane(8 * m + r).address) - ring) / 16 % 8;
    }
    if (banks != 0xff) fail("ldmatrix: rows of a matrix lie in the same banks");
    std::memcpy(&x[m], static_cast<char const*>(of_lane(8 * m + lane() / 4).address) + lane() % 4 * 4, 4);
  }
  sync_warp();
}
}  // namespace srelu24
