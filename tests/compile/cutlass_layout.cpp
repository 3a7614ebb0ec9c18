// Prints where CUTLASS's sm90 sparse GEMM expects the kept values and E of a K-major A: `cutlass_layout M K TILE_K BITS`,
// with BITS = 16 for bfloat16 and 8 for e4m3 values.
// Host code only. Output, as native int64:
//   rows, columns, cosize of E;  rows, columns, cosize of A, all in elements of the uncompressed matrix;
//   the offset of every group (row, 4 g) of E, row by row;  the same of A.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/bfloat16.h"
#include "cutlass/float8.h"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"

namespace {

template <class Layout>
void describe(std::vector<int64_t>& out, Layout const& layout) {
  out.insert(out.end(), {cute::size<0>(layout), cute::size<1>(layout), cute::cosize(layout)});
}

template <class Layout>
void list_groups(std::vector<int64_t>& out, Layout const& layout) {
  for (int row = 0; row < cute::size<0>(layout); ++row)
    for (int column = 0; column < cute::size<1>(layout); column += 4) out.push_back(layout(row, column, 0));
}

// sm90_sparse_gmma_builder.inl names this type with the K of the tile, at most 128.
template <class Element, int kAtomK>
int print(int m, int k) {
  using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, Element>, cute::GMMA::Major::K,
                                               cute::sparse_elem<8, uint8_t>, cute::Int<kAtomK>>;
  auto problem = cute::make_tuple(m, 8, k, 1);
  auto e = Config::fill_layoutE(problem);
  auto a = Config::fill_layoutA(problem);
  std::vector<int64_t> out;
  describe(out, e);
  describe(out, a);
  list_groups(out, e);
  list_groups(out, a);
  return std::fwrite(out.data(), sizeof(int64_t), out.size(), stdout) == out.size() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  int m = std::atoi(argv[1]), k = std::atoi(argv[2]), tile_k = std::atoi(argv[3]), bits = std::atoi(argv[4]);
  int atom_k = tile_k < 128 ? tile_k : 128;
  if (bits == 8) {
    switch (atom_k) {
      case 64:
        return print<cutlass::float_e4m3_t, 64>(m, k);
      case 128:
        return print<cutlass::float_e4m3_t, 128>(m, k);
      default:
        return 2;
    }
  }
  switch (atom_k) {
    case 32:
      return print<cutlass::bfloat16_t, 32>(m, k);
    case 64:
      return print<cutlass::bfloat16_t, 64>(m, k);
    case 96:
      return print<cutlass::bfloat16_t, 96>(m, k);
    case 128:
      return print<cutlass::bfloat16_t, 128>(m, k);
    default:
      return 2;
  }
}
