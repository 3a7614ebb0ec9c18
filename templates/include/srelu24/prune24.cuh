// 2:4 pruning of one thread's 16 neighbouring features in two rows, entirely in registers.
//
// A register holds one feature of row g (low half) and of row g + 8 (high half), so every instruction
// works on both rows. The result is what the sparse tensor core wants: eight kept values per row and one
// 32-bit metadata word (low half row g, high half row g + 8; one nibble i0 | i1 << 2 per group of four).
//
// Order of magnitudes: NaN > +Inf > finite; ties go to the lower index (docs/numerics.md). Magnitudes are
// compared as 15-bit integers, which is that order exactly, for bfloat16 and half alike.
#pragma once

#include <srelu24/activation.cuh>
#include <srelu24/packed.cuh>
#include <srelu24/static_for.cuh>

namespace srelu24 {

__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t x, uint32_t y) {
  return (x & mask) | (y & ~mask);
}

/// Keeps the two largest magnitudes of (a, b, c, d); `kept0` has the lower index.
/// `nibble` gets 4 index bits at bit `Shift` (row g) and at bit `Shift + 16` (row g + 8).
template <int Shift>
__device__ __forceinline__ void prune_group(uint32_t const (&value)[4], uint32_t const (&magnitude)[4], uint32_t& kept0,
                                            uint32_t& kept1, uint32_t& nibble) {
  auto const [a, b, c, d] = magnitude;
  uint32_t const first_ge = mask_ge(a, b);                              // a beats b
  uint32_t const third_ge = mask_ge(c, d);                              // c beats d
  uint32_t const low_pair = mask_ge(__vminu2(a, b), __vmaxu2(c, d));    // both of a, b are kept
  uint32_t const high_pair = ~mask_ge(__vmaxu2(a, b), __vminu2(c, d));  // both of c, d are kept
  uint32_t const keep_a = low_pair | first_ge;

  kept0 = select(high_pair, value[2], select(keep_a, value[0], value[1]));
  kept1 = select(low_pair, value[1], select(high_pair | ~third_ge, value[3], value[2]));

  nibble |= ~(high_pair | keep_a) & (0x00010001u << Shift);               // i0 = 1
  nibble |= high_pair & (0x00020002u << Shift);                           // i0 = 2
  nibble |= (low_pair | high_pair | ~third_ge) & (0x00040004u << Shift);  // i1 odd
  nibble |= ~low_pair & (0x00080008u << Shift);                           // i1 >= 2
}

/// Prunes 16 neighbouring features: `value[f]` holds feature f of both rows. The result is their word of E.
/// They come from Activation::round or prepare; selection is by magnitude, and kept values get Activation::finish.
template <class Element, class Activation>
__device__ __forceinline__ uint32_t prune16(uint32_t const (&value)[16], uint4& row_low, uint4& row_high) {
  using P = Packed<Element>;
  uint32_t low[4], high[4], word = 0;
  auto group = [&]<int G>() {
    uint32_t v[4], magnitude[4], kept0, kept1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = value[4 * G + i];
      // Where signs may occur, drop them, and let all NaNs tie.
      magnitude[i] = Activation::kNonNegative ? v[i] : __vminu2(v[i] & 0x7fff7fffu, P::kInfinity + 0x00010001u);
    }
    prune_group<4 * G>(v, magnitude, kept0, kept1, word);
    kept0 = Activation::template finish<P>(kept0);
    kept1 = Activation::template finish<P>(kept1);
    low[G] = low_halves(kept0, kept1);
    high[G] = high_halves(kept0, kept1);
  };
  static_for<4>(group);
  row_low = make_uint4(low[0], low[1], low[2], low[3]);
  row_high = make_uint4(high[0], high[1], high[2], high[3]);
  return word;
}

}  // namespace srelu24
