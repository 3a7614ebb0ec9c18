// Asynchronous copies to shared memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include <srelu24/packed.cuh>

namespace srelu24 {

/// 16 bytes to shared memory, of which the first `bytes` are read and the others zero. CuTe's copies take all or none.
__device__ __forceinline__ void copy16(uint32_t shared, void const* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

}  // namespace srelu24
