// Quantises 16-bit rows to e4m3 with a scale for each. One CTA does a row and reads it once. For the GEMM that follows
// it also writes what the recipe needs for each row: the zero that a maximum begins from, or a scale of S that is
// predicted from the row's norm.
#pragma once

#include <srelu24/scale.cuh>

namespace srelu24 {

/// Arguments of quantize_rows. Input is [m, n] in 16 bits.
struct QuantizeParams {
  void const* in;
  void* out;                  // e4m3 [m, n]
  float* scale;               // [m]
  uint32_t* r_largest;        // [m], set to zero for the GEMM that follows, or null
  float const* row_norm;      // [1]: largest norm of a row of W1, or null where S is not to have a predicted scale
  float const* bias_largest;  // [1]: largest magnitude of the bias, or null
  float* s_scale;             // [m]
  float* s_inverse;           // [m]
  int64_t in_stride, out_stride;
  int32_t m, n;
};

/// By how much rounding may exceed the bound of Cauchy-Schwarz (srelu24/fp8/reference.py).
inline constexpr float kBoundMargin = 1.07f;

template <class Element>
__device__ __forceinline__ void quantize_rows(QuantizeParams const& p) {
  using P = Packed<Element>;
  constexpr int kThreads = 128;
  constexpr int kHeld = 8;  // vectors that a thread keeps, 8192 columns of a row; others are read again, from L1 or L2
  int const row = blockIdx.x, thread = threadIdx.x, vectors = p.n / 8;
  auto const* in = reinterpret_cast<uint4 const*>(static_cast<Element const*>(p.in) + row * p.in_stride);
  auto* out = reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);

  uint32_t largest = 0;  // of the magnitudes, in both halves; as integers they order like floats, NaN above infinity
  float squares = 0.f;
  auto inspect = [&](uint4 const& v) {
    for (uint32_t x : {v.x, v.y, v.z, v.w}) {
      largest = __vmaxu2(largest, x & 0x7fff7fffu);
      float const low = P::low(x), high = P::high(x);
      squares = fmaf(low, low, fmaf(high, high, squares));
    }
  };
  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    int const v = thread + i * kThreads;
    held[i] = v < vectors ? __ldg(in + v) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) inspect(held[i]);
  for (int v = thread + kHeld * kThreads; v < vectors; v += kThreads) inspect(__ldg(in + v));

#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, lanes));
    squares += __shfl_xor_sync(~0u, squares, lanes);
  }
  __shared__ uint32_t warp_largest[kThreads / 32];
  __shared__ float warp_squares[kThreads / 32];
  if (thread % 32 == 0) {
    warp_largest[thread / 32] = largest;
    warp_squares[thread / 32] = squares;
  }
  __syncthreads();
  largest = 0;
  squares = 0.f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    largest = __vmaxu2(largest, warp_largest[w]);
    squares += warp_squares[w];
  }
  float const amax = P::low(max(largest & 0xffffu, largest >> 16));
  float const inverse = inverse_scale_of(amax);

  auto store = [&](int v, uint4 const& x) {
    out[v] = {round_e4m3(P::low(x.x) * inverse, P::high(x.x) * inverse, P::low(x.y) * inverse, P::high(x.y) * inverse),
              round_e4m3(P::low(x.z) * inverse, P::high(x.z) * inverse, P::low(x.w) * inverse, P::high(x.w) * inverse)};
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * kThreads < vectors) store(thread + i * kThreads, held[i]);
  }
  for (int v = thread + kHeld * kThreads; v < vectors; v += kThreads) store(v, __ldg(in + v));

  if (thread == 0) {
    p.scale[row] = scale_of(amax);
    if (p.r_largest != nullptr) p.r_largest[row] = 0;
    if (p.row_norm != nullptr) {
      float const bias = p.bias_largest != nullptr ? __ldg(p.bias_largest) : 0.f;
      float const bound = __fadd_rn(__fmul_rn(__fsqrt_rn(squares), __fmul_rn(__ldg(p.row_norm), kBoundMargin)), bias);
      p.s_scale[row] = scale_of(bound * bound);
      p.s_inverse[row] = inverse_scale_of(bound * bound);
    }
  }
}

}  // namespace srelu24
