// A loop whose counter is a constant expression.
#pragma once

namespace srelu24 {

/// Calls f.template operator()<I>() for I = First, .., Count - 1, in this order.
template <int Count, int First = 0, class F>
__device__ __forceinline__ void static_for(F&& f) {
  if constexpr (First < Count) {
    f.template operator()<First>();
    static_for<Count, First + 1>(f);
  }
}

}  // namespace srelu24
