// A rendered mma.sync kernel as a function: every CTA of the grid, one after the other.
#include <cuda_shim.h>

#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
#define asm(...) static_assert(false, "inline PTX has no place in an emulated kernel")

#include KERNEL

alignas(128) uint8_t srelu24::ring[1 << 18];

extern "C" void run(srelu24::GemmParams const* params, int grid) {
  std::memset(srelu24::ring, 0xff, sizeof(srelu24::ring));
  emulator::cta = std::make_unique<std::barrier<>>(Config::kThreads);
  emulator::warps.clear();
  for (int w = 0; w < Config::kThreads / 32; ++w) emulator::warps.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> threads;
  for (int t = 0; t < Config::kThreads; ++t) {
    threads.emplace_back([=] {
      threadIdx.x = t;
      for (int block = 0; block < grid; ++block) {
        __syncthreads();
        if (t == 0) blockIdx.x = block;
        __syncthreads();
        emulator::groups.assign(1, {});
        srelu24_kernel(*params);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}
