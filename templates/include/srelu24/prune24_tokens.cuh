// 2:4 pruning along rows (tokens), between the threads of one warp.
//
// A register holds one feature of row g (low half) and of row g + 8 (high half); a warp holds 16 rows, a thread 16
// features of two of them. A group along tokens is rows 2i, 2i + 8, 2i + 1, 2i + 9 (srelu24/training/order.py): the
// threads g = 2i and g = 2i + 1 hold it, so one exchange of half of their registers brings whole groups together.
#pragma once

#include <srelu24/prune24.cuh>

namespace srelu24 {

/// What the nibbles of one group of four features say, for both rows: all ones in a half where it holds for its row.
struct KeptMasks {
  uint32_t first_is_1, first_is_2;    // the first kept position; where neither holds it is 0
  uint32_t second_odd, second_upper;  // the second kept position is 1 or 3; it is 2 or 3

  /// `Shift` is the bit at which the group's nibble begins in each half of `word`.
  template <int Shift>
  static __device__ __forceinline__ KeptMasks of(uint32_t word) {
    auto const spread = [&](int bit) { return (word >> (Shift + bit) & 0x00010001u) * 0xffffu; };
    return {spread(0), spread(1), spread(2), spread(3)};
  }
  __device__ __forceinline__ uint32_t first(uint32_t const (&x)[4]) const {
    return select(first_is_2, x[2], select(first_is_1, x[1], x[0]));
  }
  __device__ __forceinline__ uint32_t second(uint32_t const (&x)[4]) const {
    return select(second_upper, select(second_odd, x[3], x[2]), x[1]);
  }
  /// The four values of which `kept0` and `kept1` were kept; the others are zero.
  __device__ __forceinline__ void expand(uint32_t kept0, uint32_t kept1, uint32_t (&x)[4]) const {
    x[0] = kept0 & ~(first_is_1 | first_is_2);
    x[1] = (kept0 & first_is_1) | (kept1 & ~second_upper);
    x[2] = (kept0 & first_is_2) | (kept1 & second_upper & ~second_odd);
    x[3] = kept1 & second_upper & second_odd;
  }
};

/// Finish the values that were kept and set the others to zero; `word`: what prune16 said of the same values.
template <class Element, class Activation>
__device__ __forceinline__ void finish_kept(uint32_t (&value)[16], uint32_t word) {
  using P = Packed<Element>;
  auto group = [&]<int G>() {
    uint32_t x[4];
    auto const kept = KeptMasks::of<4 * G>(word);
    kept.expand(~0u, ~0u, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[4 * G + i] = Activation::template finish<P>(value[4 * G + i]) & x[i];
  };
  static_for<4>(group);
}

/// Eight of a thread's 16 features, pruned along the groups of its warp.
struct KeptTokens {
  uint4 first, second;  // the kept values of group g / 2 for features 8 (g % 2) .. +7 of the thread's 16
  uint32_t word;        // nibbles of the warp's four groups: low half feature 16 t + g of 64, high half + 8
};

/// Keeps the two largest magnitudes of every group along tokens, on ties the lower position first; kept values keep
/// their bits. `value[f]` holds feature f of both rows. All threads of the warp take part.
template <class Element>
__device__ __forceinline__ KeptTokens prune_tokens16(uint32_t const (&value)[16]) {
  using P = Packed<Element>;
  int const lane = threadIdx.x % 32;
  bool const odd = lane & 4;
  uint32_t kept0[4], kept1[4], word = 0;
  auto pair = [&]<int J>() {  // features 2 J, 2 J + 1 of the thread's eight, one in each half
    uint32_t even_row[2], odd_row[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      uint32_t const lower = value[2 * J + b], upper = value[2 * J + b + 8];
      uint32_t const own = odd ? upper : lower, other = __shfl_xor_sync(~0u, odd ? lower : upper, 4);
      even_row[b] = odd ? other : own;
      odd_row[b] = odd ? own : other;
    }
    uint32_t const v[4] = {low_halves(even_row[0], even_row[1]), high_halves(even_row[0], even_row[1]),
                           low_halves(odd_row[0], odd_row[1]), high_halves(odd_row[0], odd_row[1])};
    uint32_t magnitude[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) magnitude[i] = __vminu2(v[i] & 0x7fff7fffu, P::kInfinity + 0x00010001u);
    prune_group<4 * J>(v, magnitude, kept0[J], kept1[J], word);
  };
  static_for<4>(pair);

  // Nibble n is now of feature 2 n, or of 2 (n - 4) + 1, of this thread's eight. A transpose over nibbles and the eight
  // threads with the same t gives each the whole word of one feature and of the one eight later.
  uint32_t other = __shfl_xor_sync(~0u, word, 8);
  word =
      lane & 8 ? (word & 0xf0f0f0f0u) | (other >> 4 & 0x0f0f0f0fu) : (word & 0x0f0f0f0fu) | (other << 4 & 0xf0f0f0f0u);
  other = __shfl_xor_sync(~0u, word, 16);
  word = __byte_perm(word, other, lane & 16 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(~0u, word, 4);
  word = __byte_perm(word, other, lane & 4 ? 0x3276 : 0x5410);
  return {make_uint4(kept0[0], kept0[1], kept0[2], kept0[3]), make_uint4(kept1[0], kept1[1], kept1[2], kept1[3]), word};
}

}  // namespace srelu24
