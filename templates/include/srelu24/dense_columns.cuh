// Expands some columns of a packed matrix, with rows in the order of the tokens, and sets these columns to zero in the
// form that is packed along tokens: a weight gradient computes them densely, so its sparse part must not have them. A
// thread does 16 rows of a column.
#pragma once

#include <srelu24/metadata.cuh>
#include <srelu24/sm90/params.cuh>

namespace srelu24 {

__device__ __forceinline__ void dense_columns(DenseColumnsParams const& p) {
  int const chunks = (p.count + blockDim.x - 1) / blockDim.x;
  int const block = blockIdx.x / chunks, j = blockIdx.x % chunks * blockDim.x + threadIdx.x;  // block of 16 rows
  if (j >= p.count) return;
  int const column = static_cast<int>(__ldg(p.columns + j));

  if (p.token_values != nullptr) {
    auto* const kept = static_cast<uint16_t*>(p.token_values) + 8 * block * p.token_stride + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) kept[i * p.token_stride] = 0;
  }
  if (p.out == nullptr) return;

  // E in fragment order: a word has 16 columns of row g in its low half and of row g + 8 in its high half.
  using E = MetadataLayout;
  uint32_t const* const words = p.metadata + E(p.n).block(block / 4, column / E::kVectorColumns) * E::kBlockWords +
                                4 * (E::thread(block % 4, 0, 0) + column % E::kWordColumns / 16) + E::word(column);
  auto const* const values = static_cast<uint16_t const*>(p.values) + column / 4 * 2;
  auto* const out = static_cast<uint16_t*>(p.out) + j;
  uint32_t const place = column % 4;
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    uint32_t const word = __ldg(words + 4 * E::thread(0, g, 0));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int const row = g + 8 * h;
      uint32_t const nibble = word >> (column % 16 / 4 * 4 + 16 * h);
      uint32_t const pair =
          __ldg(reinterpret_cast<uint32_t const*>(values + (16 * static_cast<int64_t>(block) + row) * p.stride));
      uint32_t const x = (nibble & 3) == place ? pair & 0xffff : (nibble >> 2 & 3) == place ? pair >> 16 : 0;
      int64_t const token = static_cast<int64_t>(row) * p.row_step + static_cast<int64_t>(block) * p.block_step;
      out[token * p.count] = static_cast<uint16_t>(x);
    }
  }
}

}  // namespace srelu24
