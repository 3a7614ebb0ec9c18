// Epilogues of the training kernels (docs/training.md, "The kernels"): packing along tokens, the gradient of the hidden
// activations, weight gradients. Layout of the accumulators as in epilogue.cuh.
#pragma once

#include <srelu24/block.cuh>
#include <srelu24/prune24_tokens.cuh>

namespace srelu24 {

/// Prunes this warp's 16 rows along tokens, for the 64 columns from `column` on, and stores values and E. `value[f]`
/// holds feature 16 t + f of both rows; it is zero beyond the matrix.
template <class Config, class Params>
__device__ __forceinline__ void store_along_tokens(uint32_t const (&value)[16], Params const& p,
                                                   BlockPosition const& at, int column) {
  using Element = typename Config::Element;
  auto const& out = p.tokens;
  KeptTokens const kept = prune_tokens16<Element>(value);
  int const g = at.thread % 32 / 4, t = at.thread % 4;
  int const token = at.row - g;  // the warp's first row
  int const feature = column + 16 * t + 8 * (g % 2);
  bool const inside = token < p.m && feature < p.n;  // n is a multiple of 8
  auto* values = static_cast<Element*>(out.values) + (token / 2 + g / 2 * 2) * out.stride + feature;
  store16(values, kept.first, inside);
  store16(values + out.stride, kept.second, inside);
  if (column < p.n) {
    // E of the transpose: its rows are features, its columns tokens.
    using E = MetadataLayout;
    E const layout(p.m);
    int64_t const vector = layout.block(column / 64, token / E::kVectorColumns) * E::kBlockVectors + 32 * t + 4 * g +
                           token / 16 % 4;  // thread(t, g, token / 16 % 4) of that block
    out.metadata[4 * vector + token / E::kWordColumns % 4] = kept.word;
  }
}

/// 2 d sqrt(s) in both halves, rounded once; zero where s is zero, whatever d is.
template <class Element>
__device__ __forceinline__ uint32_t gradient2(uint32_t d, uint32_t s) {
  using P = Packed<Element>;
  auto const root = [](float x) {
    float r;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
  };
  uint32_t const y = P::round(2 * P::low(d) * root(P::low(s)), 2 * P::high(d) * root(P::high(s)));
  return y & mask_ge(s & 0x7fff7fffu, 0x00010001u);
}

/// dY1 = 2 dS sqrt(S) on the places that S keeps: packed along features, where it shares the E of S, and along tokens.
/// LoadOrder::kOwn16, kTileN == 256.
template <class Config, class Params>
__device__ __forceinline__ void store_hidden_gradient(float (&acc)[Config::kTileN / 2], Params const& p,
                                                      BlockPosition const& at) {
  using Element = typename Config::Element;
  using P = Packed<Element>;
  static_assert(Config::kTileN == 256, "one 16-byte vector of E covers 256 columns");
  auto const& s = p.tokens;
  using E = MetadataLayout;
  E const layout(p.n);
  uint4 const e =
      __ldg(s.s_metadata + layout.block(at.block, at.column / E::kVectorColumns) * E::kBlockVectors + at.thread);
  uint32_t const words[4] = {e.x, e.y, e.z, e.w};
  auto const* const s_row = static_cast<Element const*>(s.s) + at.row * s.s_stride;
  auto* const out_row = static_cast<Element*>(p.out) + at.row * p.out_stride;
  bool const low_inside = at.row < p.m, high_inside = at.row + 8 < p.m;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    int const feature = at.column + 64 * q + at.thread % 4 * 16;
    bool const inside = feature < p.n;  // n is a multiple of 16
    auto const load = [&](int64_t offset, bool guard) {
      return guard ? __ldg(reinterpret_cast<uint4 const*>(s_row + offset + feature / 2)) : make_uint4(0, 0, 0, 0);
    };
    uint4 const s_low = load(0, inside && low_inside), s_high = load(8 * s.s_stride, inside && high_inside);
    uint32_t const s_lows[4] = {s_low.x, s_low.y, s_low.z, s_low.w};
    uint32_t const s_highs[4] = {s_high.x, s_high.y, s_high.z, s_high.w};
    uint32_t low[4], high[4], value[16];
    auto group = [&]<int G>() {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const column = 16 * q + 4 * G + i;
        x[i] = P::round(acc[accumulator_index(column, 0)], acc[accumulator_index(column, 1)]);
      }
      auto const kept = KeptMasks::of<4 * G>(words[q]);
      uint32_t const y0 = gradient2<Element>(kept.first(x), low_halves(s_lows[G], s_highs[G]));
      uint32_t const y1 = gradient2<Element>(kept.second(x), high_halves(s_lows[G], s_highs[G]));
      low[G] = low_halves(y0, y1);
      high[G] = high_halves(y0, y1);
      kept.expand(y0, y1, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) value[4 * G + i] = x[i];
    };
    static_for<4>(group);
    store16(out_row + feature / 2, make_uint4(low[0], low[1], low[2], low[3]), inside && low_inside);
    store16(out_row + 8 * p.out_stride + feature / 2, make_uint4(high[0], high[1], high[2], high[3]),
            inside && high_inside);
    store_along_tokens<Config>(value, p, at, at.column + 64 * q);
  }
}

/// A weight gradient: the accumulators [m features, n], or transposed, as fp32 or in the storage type, added to what is
/// there if asked. Columns are in their own order: a thread holds two neighbours of every eight. Transposed it swaps
/// one of them with the thread of the next row, and holds two neighbouring rows instead.
template <class Config, class Params>
__device__ __forceinline__ void store_weight_gradient(float (&acc)[Config::kTileN / 2], Params const& p,
                                                      BlockPosition const& at) {
  using Out = typename Config::Output;
  struct alignas(2 * sizeof(Out)) Pair {
    Out x, y;
  };
  bool const odd = Config::kTransposed && at.thread % 32 / 4 % 2;
  auto* const out = static_cast<Out*>(p.out);
#pragma unroll
  for (int j = 0; j < Config::kTileN / 8; ++j) {
    int64_t const column = at.column + 8 * j + at.thread % 4 * 2 + odd;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = acc[accumulator_index(2 * j, h)], y = acc[accumulator_index(2 * j + 1, h)];
      int64_t const row = at.row + 8 * h - odd;
      if constexpr (Config::kTransposed) {
        float const other = __shfl_xor_sync(~0u, odd ? x : y, 4);
        (odd ? x : y) = other;
      }
      if (row >= p.m || column >= p.n) continue;  // both are multiples of 64
      auto* const to = reinterpret_cast<Pair*>(Config::kTransposed ? out + column * p.out_stride + row
                                                                   : out + row * p.out_stride + column);
      // No other thread adds to these, and a reduction need not be waited for.
      if constexpr (Config::kAccumulate && sizeof(Out) == 4) {
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
        continue;
      }
      if constexpr (Config::kAccumulate) {
        x += static_cast<float>(to->x);
        y += static_cast<float>(to->y);
      }
      *to = {static_cast<Out>(x), static_cast<Out>(y)};
    }
  }
}

}  // namespace srelu24
