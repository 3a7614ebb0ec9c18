// The activations, one struct each: what happens to a value before it is stored or pruned. A template binds one of them
// as Config::Activation (bindings.py has the table), so a new one is a struct here and a row there.
//
// Values are in pairs in a register (packed.cuh), P is Packed of the type they are stored in. An activation has two
// halves, because 2:4 selection lies between them: `round` or `prepare` gives the values whose magnitudes are compared,
// `finish` is applied to those that are kept. Without pruning all values get both.
#pragma once

#include <srelu24/packed.cuh>

namespace srelu24 {

/// Values as they are, rounded once.
struct Identity {
  /// Whether `round` and `prepare` leave nothing below +0 and no NaN but the canonical one: then the bits are
  /// magnitudes. (An enumerator, since NVRTC would put a variable into every binary.)
  enum : bool { kNonNegative = false };

  /// From two fp32 sums.
  template <class P>
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    return P::round(low, high);
  }
  /// The same, from values that are rounded already.
  template <class P>
  static __device__ __forceinline__ uint32_t prepare(uint32_t x) {
    return x;
  }
  template <class P>
  static __device__ __forceinline__ uint32_t finish(uint32_t x) {
    return x;
  }
};

/// max(x, 0)^2: rounded to the storage type, max(., 0) in the same instruction, and squared in the storage type, which
/// rounds again.
struct Relu2 {
  enum : bool { kNonNegative = true };

  template <class P>
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    return P::round_relu(low, high);
  }
  template <class P>
  static __device__ __forceinline__ uint32_t prepare(uint32_t x) {
    return P::relu(x);
  }
  template <class P>
  static __device__ __forceinline__ uint32_t finish(uint32_t x) {
    return P::square(x);
  }
};

/// max(x, 0), rounded once: the first half of Relu2.
struct Relu {
  enum : bool { kNonNegative = true };

  template <class P>
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    return P::round_relu(low, high);
  }
  template <class P>
  static __device__ __forceinline__ uint32_t prepare(uint32_t x) {
    return P::relu(x);
  }
  template <class P>
  static __device__ __forceinline__ uint32_t finish(uint32_t x) {
    return x;
  }
};

/// The first half of an activation alone: for kernels that do the second half elsewhere, as those of 8 bits do, which
/// square in fp32 on the way to a scaled result.
template <class Activation>
struct Unfinished : Activation {
  template <class P>
  static __device__ __forceinline__ uint32_t finish(uint32_t x) {
    return x;
  }
};

}  // namespace srelu24
