// Shared memory to accumulators: one consumer warpgroup's 64 rows of the tile.
//
// One MMA group stays in flight: step i is issued before step i - 1 has retired, and the stage of
// step i - 1 goes back to the producer as soon as it has. CUTLASS's sparse mainloop keeps none in flight,
// which costs 6-8 %.
#pragma once

#include <cuda/std/type_traits>
#include <cuda/std/utility>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>

#include <srelu24/sm90/pipeline.cuh>

namespace srelu24 {

using cute::SM90::GMMA::ScaleOut;

/// Shared-memory descriptor of a K-major operand whose rows are one swizzle span of bytes. Only the address
/// in the low word varies, so advancing along K is one 32-bit addition.
template <int SpanBytes>
struct MatrixDescriptor {
  uint32_t low;

  __device__ __forceinline__ explicit MatrixDescriptor(void const* smem)
      : low(cute::cast_smem_ptr_to_uint(smem) >> 4 | 1u << 16) {}  // the leading offset is unused, and 1

  /// The descriptor `bytes` further along K.
  __device__ __forceinline__ uint64_t at(int bytes) const {
    using cute::SM90::GMMA::LayoutType;
    cute::GmmaDescriptor d;
    d.bitfield.stride_byte_offset_ = 8 * SpanBytes >> 4;
    d.bitfield.layout_type_ = static_cast<uint8_t>(SpanBytes == 128 ? LayoutType::B128 : LayoutType::B64);
    d.reg32_[0] = low + (bytes >> 4);
    return d;
  }
};

/// The same for an MN-major operand: a row of 128 bytes holds 64 of M or N at one index of K, and the next 64 of M or N
/// are `LeadingBytes` further.
template <int LeadingBytes>
struct MnMajorDescriptor {
  // A descriptor's address has no room for the rank in the cluster, which the shared address carries in its high bits:
  // there it would change the leading offset. A K-major operand has no use for that.
  static constexpr uint32_t kAddressBits = (1 << 18) - 1;

  uint32_t low;

  __device__ __forceinline__ explicit MnMajorDescriptor(void const* smem)
      : low((cute::cast_smem_ptr_to_uint(smem) & kAddressBits) >> 4 | LeadingBytes >> 4 << 16) {}

  /// The descriptor further along K by as much as `bytes` are in a K-major row, where an element takes 2 bytes.
  __device__ __forceinline__ uint64_t at(int bytes) const {
    cute::GmmaDescriptor d;
    d.bitfield.stride_byte_offset_ = 8 * 128 >> 4;
    d.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
    d.reg32_[0] = low + (bytes / 2 * 128 >> 4);
    return d;
  }
};

template <class Config>
struct Mainloop {
  static constexpr int kAccumulators = Config::kTileN / 2;
  using Accumulators = float[kAccumulators];
  static constexpr int kSpanA = Config::kSparse ? 64 : 128;
  using DescriptorA =
      cuda::std::conditional_t<Config::kAlongTokens, MnMajorDescriptor<32 * 128>, MatrixDescriptor<kSpanA>>;
  using DescriptorB =
      cuda::std::conditional_t<Config::kAlongTokens, MnMajorDescriptor<64 * 128>, MatrixDescriptor<128>>;

  SharedStorage<Config>& shared;
  int const warpgroup;  // consumer index: rows [64 * warpgroup, +64) of the tile
  RingPosition<Config::kStages> ring{0, 0};

  __device__ __forceinline__ Mainloop(SharedStorage<Config>& s, int consumer) : shared(s), warpgroup(consumer) {}

  /// accumulators += A B^T over `k_blocks` k-blocks, dense A. `producer` is called once in each step, while MMAs are in
  /// flight; `at_end` once the last MMAs are issued, where it may load what the epilogue needs.
  template <class Producer, class AtEnd>
  __device__ __forceinline__ void dense(Accumulators& accumulators, int k_blocks, Producer& producer, AtEnd&& at_end) {
    Accumulators own;
    Accumulators& sums = sums_of(accumulators, own);
    bool first = true;
#pragma unroll 1
    for (; k_blocks > 0; --k_blocks) {
      step(sums, first, producer, [&](DescriptorA a, DescriptorB b) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // an instruction takes 32 bytes: 16 of K, or 32 in 8 bits
          fma<typename Config::Mma>(sums, a.at(32 * k), b.at(32 * k));
        }
      });
      first = Config::kPromote;
      if (Config::kPromote && k_blocks > 1) promote(accumulators, sums);
    }
    at_end();
    drain(accumulators, sums);
  }

  /// The same for a packed A. `metadata` points at this thread's E: a 16-byte vector feeds 256 of K, and the next one
  /// lies a block of E further. `e` holds the first vector, already loaded, and something else afterwards.
  template <class Producer, class AtEnd>
  __device__ __forceinline__ void sparse(Accumulators& accumulators, int k_blocks, uint4 const* metadata,
                                         uint32_t (&e)[4], Producer& producer, AtEnd&& at_end) {
    Accumulators own;
    Accumulators& sums = sums_of(accumulators, own);
    uint32_t other[4];  // two vectors take turns: one feeds the MMAs while the next arrives
    bool first = true;
    auto vector = [&](uint32_t (&current)[4], uint32_t (&next)[4]) {
      bool const last = sparse_vector(sums, first, k_blocks, metadata, current, next, producer);
      if (Config::kPromote && !last) {
        promote(accumulators, sums);
        first = true;
      }
      return last;
    };
    while (!vector(e, other) && !vector(other, e)) {
    }
    at_end();
    drain(accumulators, sums);
  }

  /// E is read once: keep it out of L1.
  static __device__ __forceinline__ void load_vector(uint32_t (&e)[4], uint4 const* p) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(e[0]), "=r"(e[1]), "=r"(e[2]), "=r"(e[3])
                 : "l"(p));
  }

 private:
  /// Multiplies the k-blocks of one vector of E, and loads the next vector. True once the last k-block is issued.
  template <class Producer>
  __device__ __forceinline__ bool sparse_vector(Accumulators& accumulators, bool& first, int& left,
                                                uint4 const*& metadata, uint32_t (&e)[4], uint32_t (&next)[4],
                                                Producer& producer) {
    metadata += MetadataLayout::kBlockVectors;
#pragma unroll
    for (int q = 0; q < kVectorBlocks<Config>; ++q) {
      step(accumulators, first, producer, [&](DescriptorA a, DescriptorB b) {
        // An instruction takes 32 bytes of packed A and 64 of B. In 16 bits one register of E serves both halves of the
        // k-block: lanes t = 0, 1 supply the first, t = 2, 3 the second. In 8 bits each half has a register.
        constexpr int kRegisters = 4 / kVectorBlocks<Config>;
        sparse_fma<typename Config::Mma>(accumulators, a.at(0), b.at(0), e[kRegisters * q]);
        sparse_fma<typename Config::MmaUpper>(accumulators, a.at(32), b.at(64), e[kRegisters * q + kRegisters - 1]);
      });
      // Only now has every MMA that reads `next` retired.
      if (q == 0 && left > kVectorBlocks<Config>) load_vector(next, metadata);
      first = false;
      if (--left == 0) return true;
    }
    return false;
  }

  template <class Producer, class Issue>
  __device__ __forceinline__ void step(Accumulators& accumulators, bool first, Producer& producer, Issue&& issue) {
    int const stage = ring.stage;
    shared.full[stage].wait(ring.phase);
    DescriptorA const a(shared.a[stage] + warpgroup * 64 * kSpanA);
    DescriptorB const b(shared.b[stage]);
    fence(accumulators);
    cute::warpgroup_arrive();
    issue(a, b);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    fence(accumulators);
    if (!first) release(ring.previous());
    producer.in_step(ring);
    ring.advance();
  }

  __device__ __forceinline__ void drain(Accumulators& accumulators, Accumulators& sums) {
    cute::warpgroup_wait<0>();
    fence(sums);
    release(ring.previous());
    if constexpr (Config::kPromote) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) accumulators[i] += sums[i];
    }
  }

  /// Where the tensor cores sum. They keep fewer bits of 8-bit sums than fp32 has, so with kPromote they sum 128
  /// products (a dense k-block, a vector of E) into accumulators of their own, which are then added in fp32.
  static __device__ __forceinline__ Accumulators& sums_of(Accumulators& accumulators, Accumulators& own) {
    if constexpr (!Config::kPromote) return accumulators;
    zero(own);
    return own;
  }

  __device__ __forceinline__ void promote(Accumulators& accumulators, Accumulators& sums) {
    drain(accumulators, sums);
    zero(sums);
  }

  static __device__ __forceinline__ void zero(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) sums[i] = 0.f;
  }

  /// Give the retired stage back: warp w tells CTA w of the cluster, whose producer writes into this one's B.
  __device__ __forceinline__ void release(int stage) {
    int const warp = threadIdx.x / 32 % 4;
    bool const leader = threadIdx.x % 32 == 0;
    if constexpr (Config::kClusterM == 1) {
      if (leader && warp == 0) shared.empty[stage].arrive();
    } else {
      if (leader && warp < Config::kClusterM) shared.empty[stage].arrive(warp);
    }
  }

  static __device__ __forceinline__ void fence(Accumulators& accumulators) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) cute::warpgroup_fence_operand(accumulators[i]);
  }

  template <class Atom>
  static __device__ __forceinline__ void fma(Accumulators& acc, uint64_t a, uint64_t b) {
    [&]<cuda::std::size_t... I>(cuda::std::index_sequence<I...>) {
      Atom::fma(a, b, acc[I]..., ScaleOut::One);
    }(cuda::std::make_index_sequence<kAccumulators>{});
  }

  template <class Atom>
  static __device__ __forceinline__ void sparse_fma(Accumulators& acc, uint64_t a, uint64_t b, uint32_t e) {
    [&]<cuda::std::size_t... I>(cuda::std::index_sequence<I...>) {
      Atom::fma(a, b, acc[I]..., e, ScaleOut::One);
    }(cuda::std::make_index_sequence<kAccumulators>{});
  }
};

}  // namespace srelu24
