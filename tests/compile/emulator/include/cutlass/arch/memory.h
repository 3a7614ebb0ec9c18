#pragma once

namespace cutlass::arch {
template <class T, int Bytes>
void global_store(T const& value, void* p, bool guard) {
  if (guard) *static_cast<T*>(p) = value;
}
}  // namespace cutlass::arch
