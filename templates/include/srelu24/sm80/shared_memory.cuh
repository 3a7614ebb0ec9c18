// To and from shared memory by its 32-bit addresses: asynchronous copies, and the matrices of an MMA. CuTe's copies
// take all of 16 bytes or none, and its ldmatrix a generic address, whose conversion hides what is constant in it.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include <srelu24/packed.cuh>

namespace srelu24 {

/// Copies 16 bytes to shared memory, or writes 16 zeros if `zero`. Without `there` it does nothing.
__device__ __forceinline__ void copy16(uint32_t shared, void const* global, bool zero, bool there) {
  asm volatile(
      "{.reg .pred zero, there;\n"
      "setp.ne.b32 zero, %2, 0;\n"
      "setp.ne.b32 there, %3, 0;\n"
      "@there cp.async.cg.shared.global.L2::128B [%0], [%1], 16, zero;}" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(zero)), "r"(static_cast<int>(there))
      : "memory");
}

/// The same, but only the first `bytes` of the 16 are read; the others become zero.
__device__ __forceinline__ void copy_first(uint32_t shared, void const* global, int bytes, bool there) {
  asm volatile(
      "{.reg .pred there;\n"
      "setp.ne.b32 there, %3, 0;\n"
      "@there cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;}" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(static_cast<int>(there))
      : "memory");
}

/// p + a * b bytes. One instruction, and not computed ahead of time: kept for all rows of a thread, such products would
/// take the registers of MMAs.
__device__ __forceinline__ void const* address(void const* p, uint32_t a, uint32_t b) {
  void const* sum;
  asm volatile("mad.wide.u32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(p));
  return sum;
}

/// x itself, but the compiler cannot know that two calls give the same, so it does not keep what follows from it.
__device__ __forceinline__ uint32_t unknown(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

}  // namespace srelu24
