// What happens to the accumulators before the mainloop (bias and residual are their initial values) and
// after it (activation, pruning, stores), for the GEMMs of every architecture. A thread (g = lane / 4, t = lane % 4) of
// a warp with 16 rows holds rows g and g + 8, and of every 8 columns 8j the two 8j + 2t + {0, 1}: accumulator
// 4j + 2h + b is row half h, column 8j + 2t + b. LoadOrder says which output column that is.
//
// Config::kTileN are the columns that one thread's accumulators span: the whole tile's under wgmma, a warp's under
// mma.sync. Params is the kernel's own parameter struct; the fields used here have the same names in all.
#pragma once

#include <srelu24/block.cuh>
#include <srelu24/epilogue_training.cuh>
#include <srelu24/load_order.cuh>
#include <srelu24/prune24.cuh>

namespace srelu24 {

/// Eight neighbouring elements, 16-byte aligned, as floats.
template <class Element>
__device__ __forceinline__ void load8(float (&x)[8], void const* p) {
  uint4 const v = __ldg(static_cast<uint4 const*>(p));
  uint32_t const w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = Packed<Element>::low(w[i]);
    x[2 * i + 1] = Packed<Element>::high(w[i]);
  }
}

/// First of the eight neighbouring output columns that accumulators [16i, 16i + 16) hold for two rows.
template <class Config>
__device__ __forceinline__ int column_of(BlockPosition const& at, int i) {
  int const t = at.thread % 4;
  return at.column + (Config::kLoadOrder == LoadOrder::kOwn16 ? 64 * (i / 2) + 16 * t + 8 * (i % 2) : 32 * i + 8 * t);
}

/// Sets the accumulators before the mainloop: to bias + residual where the kernel has them, no scales follow and this
/// is the tile's first piece along K, else to 0. Loaded straight into the accumulators, bias and residual take no
/// registers of their own. The first MMA could also be told to ignore the accumulators instead of having them set to
/// zero, but it names them as inputs all the same, which would keep their registers taken between tiles, where the work
/// is decoded.
template <class Config, class Params>
__device__ __forceinline__ void initialize(float (&acc)[Config::kTileN / 2], Params const& p, BlockPosition const& at,
                                           bool first_piece) {
  using Element = typename Config::Output;
  constexpr bool kBias = Config::kBias && !Config::kScaled, kResidual = Config::kResidual && !Config::kScaled;
#pragma unroll
  for (int i = 0; i < Config::kTileN / 32; ++i) {
    int const column = column_of<Config>(at, i);
    bool const inside = column < p.n && first_piece;  // n is a multiple of 8
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t const row = at.row + 8 * h;
      float x[8] = {};
      if constexpr (kResidual) {
        if (inside && row < p.m) {
          load8<Element>(x, static_cast<Element const*>(p.residual) + row * p.residual_stride + column);
        }
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) acc[accumulator_index(8 * i + c, h)] = x[c];
    }
  }
#pragma unroll
  for (int i = 0; i < Config::kTileN / 32; ++i) {
    int const column = column_of<Config>(at, i);
    float bias[8] = {};
    if constexpr (kBias) {
      if (column < p.n && first_piece) load8<Element>(bias, static_cast<Element const*>(p.bias) + column);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) acc[accumulator_index(8 * i + c, h)] += bias[c];
    }
  }
}

/// Loads, from an array [m] with a step of 1 or [1] with a step of 0, what belongs to a thread's rows g and g + 8.
__device__ __forceinline__ void load_of_rows(float (&x)[2], float const* of_rows, int step, int m,
                                             BlockPosition const& at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int64_t const row = at.row + 8 * h;
    x[h] = row < m ? __ldg(of_rows + row * step) : 0.f;
  }
}

/// Loads, from an array over the tile's columns, what belongs to this thread's: x[8i + c] is that of column c of the
/// eight that accumulators [16i, 16i + 16) hold.
template <class Config>
__device__ __forceinline__ void load_of_columns(float (&x)[Config::kTileN / 4], float const* of_columns,
                                                BlockPosition const& at) {
#pragma unroll
  for (int i = 0; i < Config::kTileN / 32; ++i) {
#pragma unroll
    for (int c = 0; c < 8; c += 4) {
      float4 const v = *reinterpret_cast<float4 const*>(of_columns + column_of<Config>(at, i) - at.column + c);
      float const four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) x[8 * i + c + j] = four[j];
    }
  }
}

/// What 8-bit sums stand for: acc * b_scale * a_scale + bias + residual, each operation rounded by itself. Applied to
/// a few accumulators at a time, right before they are stored, since registers are short. With Held the columns' scales
/// are in registers nevertheless (load_of_columns).
template <class Config, class Params, bool Held = false>
struct Scaling {
  using Output = typename Config::Output;
  Params const& p;
  BlockPosition const& at;
  float const* column_scale;  // of the columns from at.column on; with Held, what load_of_columns has loaded
  float const* bias;
  int columns;  // how many of them may be read
  float row_scale[2];

  /// Scales in global memory.
  __device__ __forceinline__ Scaling(Params const& params, BlockPosition const& position) : p(params), at(position) {
    if constexpr (Config::kScaled) {
      column_scale = p.scale.b + at.column;
      bias = static_cast<float const*>(p.bias) + at.column;
      columns = p.n - at.column;
      load_of_rows(row_scale, p.scale.a, p.scale.a_step, p.m, at);
    }
  }
  /// Scales that the kernel has already brought to shared memory or registers, where there is room for a whole tile's:
  /// to load them from L2 for every few accumulators takes longer than all the rest of the epilogue. Columns beyond the
  /// matrix are scaled by whatever lies there, and not stored.
  __device__ __forceinline__ Scaling(Params const& params, BlockPosition const& position, float const (&of_rows)[2],
                                     float const* of_columns, float const* biases)
      : p(params),
        at(position),
        column_scale(of_columns),
        bias(biases),
        columns(Config::kTileN),
        row_scale{of_rows[0], of_rows[1]} {}

  /// Scales accumulators [16i, 16i + 16).
  __device__ __forceinline__ void apply(float (&acc)[Config::kTileN / 2], int i) const {
    if constexpr (Config::kScaled) apply_scales(acc, i);
  }

 private:
  __device__ __forceinline__ void apply_scales(float (&acc)[Config::kTileN / 2], int i) const {
    int const column = column_of<Config>(at, i), place = column - at.column;
#pragma unroll
    for (int c = 0; c < 8; c += 4) {
      auto four = [&](float const* of_columns) {
        return place < columns ? *reinterpret_cast<float4 const*>(of_columns + place + c) : float4{};
      };
      float const* const held = column_scale + 8 * i + c;
      float4 const s = Held ? float4{held[0], held[1], held[2], held[3]} : four(column_scale);
      float4 const b = Config::kBias ? four(bias) : float4{};
      float const scales[4] = {s.x, s.y, s.z, s.w}, biases[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& x = acc[accumulator_index(8 * i + c + j, h)];
          x = __fmul_rn(__fmul_rn(x, scales[j]), row_scale[h]);
          if constexpr (Config::kBias) x = __fadd_rn(x, biases[j]);
        }
      }
    }
    if constexpr (Config::kResidual) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int64_t const row = at.row + 8 * h;
        float r[8] = {};
        if (row < p.m && column < p.n) {
          load8<Output>(r, static_cast<Output const*>(p.residual) + row * p.residual_stride + column);
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float& x = acc[accumulator_index(8 * i + c, h)];
          x = __fadd_rn(x, r[c]);
        }
      }
    }
  }
};

/// out = act(accumulators), row-major, LoadOrder::kOwn8: eight columns a store. 8-bit sums are scaled first.
template <class Config, class Params, bool Held = false>
__device__ __forceinline__ void store_dense(float (&acc)[Config::kTileN / 2], Params const& p, BlockPosition const& at,
                                            Scaling<Config, Params, Held> const& scaling) {
  using Element = typename Config::Output;
  using P = Packed<Element>;
  using Activation = typename Config::Activation;
  // Where this thread's first vector of row half h goes; the others are at constant offsets from there.
  auto start_of = [&](int h) {
    int64_t place = at.row + 8 * h;
    if constexpr (Config::kPermuted) place = p.tokens.token_of(place);
    return static_cast<Element*>(p.out) + place * p.out_stride + column_of<Config>(at, 0);
  };
  constexpr bool kKeep = !(Config::kScaled && Config::kTileM == 192);  // there is no register for it in those kernels
  Element* low = kKeep ? start_of(0) : nullptr;
  asm volatile("" : "+l"(low));  // else it would be worked out anew for every store
  Element* const rows[2] = {low, Config::kPermuted ? start_of(1) : low + 8 * p.out_stride};
#pragma unroll
  for (int i = 0; i < Config::kTileN / 32; ++i) {
    int const column = column_of<Config>(at, i);
    if (column >= p.n) continue;
    scaling.apply(acc, i);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t y[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float const even = acc[accumulator_index(8 * i + 2 * c, h)], odd = acc[accumulator_index(8 * i + 2 * c + 1, h)];
        y[c] = Activation::template finish<P>(Activation::template round<P>(even, odd));
      }
      store16((kKeep ? rows[h] : start_of(h)) + 32 * i, make_uint4(y[0], y[1], y[2], y[3]), at.row + 8 * h < p.m);
    }
  }
}

/// Adds this warp's non-zeros of 16 features to the global counts. `value[f]` holds feature f of both rows; the first
/// `valid` features lie inside of the matrix.
__device__ __forceinline__ void count_nonzeros16(uint32_t const (&value)[16], int32_t* counts, int valid) {
  int const g = threadIdx.x % 32 / 4;
  uint32_t sums[4] = {};  // four byte-wide counters a word: at most 16 rows
#pragma unroll
  for (int f = 0; f < 16; ++f) {
    uint32_t const nonzero = ((value[f] & 0x7fffu) != 0) + ((value[f] & 0x7fff0000u) != 0);
    sums[f / 4] += nonzero << (8 * (f % 4));
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sums[s] += __shfl_xor_sync(~0u, sums[s], lanes);
  }
  // Lane g of the eight that share these features adds features g and g + 8.
  uint32_t const low = g & 4 ? sums[1] : sums[0], high = g & 4 ? sums[3] : sums[2];
  int const shift = 8 * (g % 4);
  if (g < valid) atomicAdd(counts + g, static_cast<int>(low >> shift & 0xff));
  if (g + 8 < valid) atomicAdd(counts + g + 8, static_cast<int>(high >> shift & 0xff));
}

/// The activation, 2:4 along the columns, packed values and E; LoadOrder::kOwn16. A 16-byte vector of E covers 256
/// columns; of it the thread writes the words of its own 64, 128 or 256.
template <class Config, class Params>
__device__ __forceinline__ void store_pruned(float (&acc)[Config::kTileN / 2], Params const& p,
                                             BlockPosition const& at) {
  using Element = typename Config::Output;
  using P = Packed<Element>;
  using Activation = typename Config::Activation;
  using E = MetadataLayout;
  constexpr int kWords = Config::kTileN / E::kWordColumns;
  static_assert(Config::kTileN % E::kWordColumns == 0 && (kWords == 1 || kWords == 2 || kWords == 4),
                "a thread writes one, two or four words of a vector of E");
  // What lies beyond the matrix, where a bias, Inf or NaN may have left something, becomes zero groups.
  uint32_t const rows = (at.row < p.m ? 0xffffu : 0u) | (at.row + 8 < p.m ? 0xffff0000u : 0u);

  struct alignas(4 * kWords) Words {
    uint32_t of[kWords];
  } words;
#pragma unroll
  for (int q = 0; q < kWords; ++q) {
    uint32_t value[16];
#pragma unroll
    for (int f = 0; f < 16; ++f) {
      uint32_t const inside = column_of<Config>(at, 2 * q + f / 8) < p.n ? rows : 0u;
      value[f] =
          Activation::template round<P>(acc[accumulator_index(16 * q + f, 0)], acc[accumulator_index(16 * q + f, 1)]) &
          inside;
    }
    int const feature = at.column + 64 * q + at.thread % 4 * 16;
    if constexpr (Config::kCountNonzeros) count_nonzeros16(value, p.counts + feature, p.n - feature);
    uint4 low, high;
    words.of[q] = prune16<Element, Activation>(value, low, high);
    auto* out = static_cast<Element*>(p.out) + static_cast<int64_t>(at.row) * p.out_stride + feature / 2;
    store16(out, low, feature < p.n && at.row < p.m);
    store16(out + 8 * p.out_stride, high, feature < p.n && at.row + 8 < p.m);
    if constexpr (Config::kTokens) {
      finish_kept<Element, Activation>(value, words.of[q]);
      store_along_tokens<Config>(value, p, at, at.column + 64 * q);
    }
  }
  E const layout(p.n);
  uint4* const vector =
      p.out_metadata + layout.block(at.block, at.column / E::kVectorColumns) * E::kBlockVectors + at.thread;
  int const word = kWords == 4 ? 0 : E::word(at.column);
  *reinterpret_cast<Words*>(reinterpret_cast<uint32_t*>(vector) + word) = words;
}

}  // namespace srelu24
