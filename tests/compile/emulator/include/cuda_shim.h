// A CTA on the CPU: a std::thread for every CUDA thread, barriers where a warp or a CTA acts together.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
struct Index {
  int x;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

inline thread_local Index threadIdx;
inline Index blockIdx;

namespace emulator {

inline std::unique_ptr<std::barrier<>> cta;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;

/// What the lanes of a warp show each other.
struct Lane {
  uint32_t a[4], b[4], e, value;
  void const* address;
};
inline Lane lanes[32][32];

inline int lane() {
  return threadIdx.x % 32;
}
inline Lane& of_lane(int l) {
  return lanes[threadIdx.x / 32][l];
}
inline void sync_warp() {
  warps[threadIdx.x / 32]->arrive_and_wait();
}

inline float bf16(uint32_t pair, int half) {
  uint32_t const bits = half ? pair & 0xffff0000u : pair << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

[[noreturn]] inline void fail(char const* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::cta->arrive_and_wait();
}

template <class T>
T __ldg(T const* p) {
  return *p;
}
template <class T>
T __ldcg(T const* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T const& x) {
  *p = x;
}

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int lanes) {
  emulator::of_lane(emulator::lane()).value = value;
  emulator::sync_warp();
  uint32_t const other = emulator::of_lane(emulator::lane() ^ lanes).value;
  emulator::sync_warp();
  return other;
}

template <class Choose>
uint32_t by_halves(uint32_t x, uint32_t y, Choose const& choose) {
  return static_cast<uint32_t>(choose(x & 0xffff, y & 0xffff)) | static_cast<uint32_t>(choose(x >> 16, y >> 16)) << 16;
}
inline uint32_t __vminu2(uint32_t x, uint32_t y) {
  return by_halves(x, y, [](uint32_t a, uint32_t b) { return min(a, b); });
}
inline uint32_t __vmaxu2(uint32_t x, uint32_t y) {
  return by_halves(x, y, [](uint32_t a, uint32_t b) { return max(a, b); });
}
inline int __reduce_add_sync(uint32_t mask, int value) {
  for (int lanes = 1; lanes < 32; lanes *= 2) value += static_cast<int>(__shfl_xor_sync(mask, value, lanes));
  return value;
}
template <class T>
T atomicAdd(T* p, T value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline uint32_t atomicMax(uint32_t* p, uint32_t value) {
  uint32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
