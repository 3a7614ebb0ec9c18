// The pruned output of 8-bit GEMMs: metadata in the 8-bit fragment order, values either as bf16 on their way to
// row-wise scales or as scaled e4m3 (docs/fp8.md).
#pragma once

#include <cuda/std/type_traits>

#include <srelu24/epilogue.cuh>
#include <srelu24/scale.cuh>

namespace srelu24 {

/// Exchanges data between the two lanes of a pair. Before, each has 16 columns of rows g (low) and g + 8 (high); after,
/// the even lane has 32 columns of row g and the odd lane 32 columns of row g + 8, as the 8-bit instructions need E.
/// The result is what the other lane gives.
__device__ __forceinline__ uint32_t trade(uint32_t low, uint32_t high, bool odd) {
  return __shfl_xor_sync(~0u, odd ? low : high, 1);
}

/// The largest of eight kept r, which are not negative: in the low half that of the even places, in the high half that
/// of the odd ones. NaN is above infinity.
__device__ __forceinline__ uint32_t largest_of(uint4 const& r) {
  return __vmaxu2(__vmaxu2(r.x, r.y), __vmaxu2(r.z, r.w));
}

/// Eight nibbles of E that each say 0 and 1: a group of four zeros keeps its first two.
inline constexpr uint32_t kZeroGroups = 0x44444444u;

/// Whether the squares S are stored, in e4m3, and not the kept r in bf16.
template <class Config>
inline constexpr bool kStoresE4m3 = sizeof(typename Config::Output) == 1;

/// How many of eight kept r saturate.
__device__ __forceinline__ int saturated_of(uint4 const& r, float scale) {
  int count = 0;
  for (uint32_t x : {r.x, r.y, r.z, r.w}) {
    float2 const s = scaled_squares(x, scale);
    count += (s.x > kUnreachableE4m3) + (s.y > kUnreachableE4m3);
  }
  return count;
}

/// The squares of eight kept r, scaled, in e4m3.
__device__ __forceinline__ uint2 to_e4m3(uint4 const& r, float scale, uint32_t mask) {
  float2 const a = scaled_squares(r.x, scale), b = scaled_squares(r.y, scale);
  float2 const c = scaled_squares(r.z, scale), d = scaled_squares(r.w, scale);
  return {round_e4m3(a.x, a.y, b.x, b.y) & mask, round_e4m3(c.x, c.y, d.x, d.y) & mask};
}

/// prune24(relu(accumulators)) packed, LoadOrder::kOwn16, with E in the 8-bit order. To bf16: r as it is, and the
/// largest r of each row. To e4m3: r * r, scaled; and how many values saturated.
template <class Config, class Params>
__device__ __forceinline__ void store_pruned_scaled(float (&acc)[Config::kTileN / 2], Params const& p,
                                                    BlockPosition const& at, Scaling<Config, Params> const& scaling,
                                                    float const (&s_inverse)[2]) {
  using P = Packed<cutlass::bfloat16_t>;
  static_assert(cuda::std::is_same_v<typename Config::Activation, Relu2>,
                "scaled_squares finishes no other activation");
  using Activation = Unfinished<typename Config::Activation>;
  constexpr bool kToE4m3 = kStoresE4m3<Config>;
  bool const odd = at.thread % 2 != 0;
  // Beyond the matrix there may be anything. It becomes zero groups by a mask on E and on what is stored, which is less
  // work than a mask on every value.
  uint32_t const rows = (at.row < p.m ? 0xffffu : 0u) | (at.row + 8 < p.m ? 0xffff0000u : 0u);
  uint32_t largest = 0, words[Config::kTileN / 64];
  int saturated = 0;
#pragma unroll
  for (int q = 0; q < Config::kTileN / 64; ++q) {
    scaling.apply(acc, 2 * q);
    scaling.apply(acc, 2 * q + 1);
    uint32_t value[16];
#pragma unroll
    for (int f = 0; f < 16; ++f) {
      value[f] =
          Activation::template round<P>(acc[accumulator_index(16 * q + f, 0)], acc[accumulator_index(16 * q + f, 1)]);
    }
    int const own = at.column + 64 * q + at.thread % 4 * 16;  // first of this thread's 16 columns
    bool const inside = own < p.n;                            // n is a multiple of 16
    uint4 low, high;                                          // eight kept r of each row
    uint32_t const word =
        select(inside ? rows : 0u, prune16<cutlass::bfloat16_t, Activation>(value, low, high), kZeroGroups);
    uint32_t const other = __shfl_xor_sync(~0u, word, 1);
    words[q] = odd ? high_halves(other, word) : low_halves(word, other);
    if constexpr (kToE4m3) {
      // The largest tell whether there is anything to count, which is rare. NaN is the largest.
      float2 const most_low = scaled_squares(largest_of(low), s_inverse[0]);
      float2 const most_high = scaled_squares(largest_of(high), s_inverse[1]);
      bool const none = most_low.x <= kUnreachableE4m3 && most_low.y <= kUnreachableE4m3 &&
                        most_high.x <= kUnreachableE4m3 && most_high.y <= kUnreachableE4m3;
      if (inside && !none) saturated += saturated_of(low, s_inverse[0]) + saturated_of(high, s_inverse[1]);
      uint32_t const mask = inside ? ~0u : 0u;
      uint2 const mine_low = to_e4m3(low, s_inverse[0], mask), mine_high = to_e4m3(high, s_inverse[1], mask);
      uint32_t const x = trade(mine_low.x, mine_high.x, odd), y = trade(mine_low.y, mine_high.y, odd);
      uint4 const kept = odd ? uint4{x, y, mine_high.x, mine_high.y} : uint4{mine_low.x, mine_low.y, x, y};
      int const column = at.column + 64 * q + at.thread % 4 / 2 * 32;
      int64_t const row = at.row + 8 * odd;
      store16(static_cast<uint8_t*>(p.out) + row * p.out_stride + column / 2, kept, column < p.n && row < p.m);
    } else {
      uint32_t const x = largest_of(low), y = largest_of(high);
      largest = __vmaxu2(largest, inside ? __vmaxu2(low_halves(x, y), high_halves(x, y)) : 0u);
      auto* out = static_cast<cutlass::bfloat16_t*>(p.out) + static_cast<int64_t>(at.row) * p.out_stride + own / 2;
      store16(out, low, inside && at.row < p.m);
      store16(out + 8 * p.out_stride, high, inside && at.row + 8 < p.m);
    }
  }
  using E = MetadataLayout;
  E const layout(p.n);
  uint4* const metadata =
      p.out_metadata + layout.block(at.block, at.column / E::kVectorColumns) * E::kBlockVectors + at.thread;
  if constexpr (Config::kTileN == 256) {
    *metadata = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (Config::kTileN == 64) {  // other warps write the other words, those beyond n too
    reinterpret_cast<uint32_t*>(metadata)[E::word(at.column)] = words[0];
  } else {  // half a vector; where the matrix ends in it, no other tile writes the other half
    static_assert(Config::kTileN == 128, "a thread writes one, two or four words of a vector of E");
    auto* const half = reinterpret_cast<uint2*>(metadata) + at.column % 256 / 128;
    *half = make_uint2(words[0], words[1]);
    if (at.column % 256 == 0 && at.column + 128 >= p.n) half[1] = make_uint2(kZeroGroups, kZeroGroups);
  }
  if constexpr (kToE4m3) {
    saturated = __reduce_add_sync(~0u, saturated);
    if (saturated != 0 && at.thread % 32 == 0) atomicAdd(p.scale.saturated, static_cast<unsigned long long>(saturated));
  } else {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (at.thread % 4 == 0) {
      // Floats that are not negative order as their bits do.
      if (at.row < p.m) atomicMax(p.scale.r_largest + at.row, largest << 16);
      if (at.row + 8 < p.m) atomicMax(p.scale.r_largest + at.row + 8, largest & 0xffff0000u);
    }
  }
}

}  // namespace srelu24
