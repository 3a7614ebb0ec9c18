// CUTLASS's own sparse GEMM for Ampere (mma.sp, cp.async), behind a C interface: with the tile, the warps and the depth
// that our mma.sync kernels have by default, for tests and timings to compare with. It shares no code with ours.

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm_sparse.h"

namespace {

using cutlass::bfloat16_t;
template <int M, int N, int K>
using Shape = cutlass::gemm::GemmShape<M, N, K>;

// Y [M, N] row-major = S [M, K] B^T, B [N, K] row-major; fp32 sums.
template <class Tile, int Stages>
struct Spgemm {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Epilogue = cutlass::epilogue::thread::LinearCombination<bfloat16_t, 8, float, float,
                                                                cutlass::epilogue::thread::ScaleType::OnlyAlphaScaling>;
  using Gemm =
      cutlass::gemm::device::SparseGemm<bfloat16_t, Row, bfloat16_t, Column, bfloat16_t, Row, float,
                                        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Shape<64, 64, 64>,
                                        Shape<16, 8, 32>, Epilogue,
                                        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, Stages, 8, 8>;
  static_assert(cutlass::platform::is_same<typename Gemm::ElementE, uint16_t>::value && Gemm::kElementsPerElementE == 8,
                "a half of 16 columns, as the order of E in Python has it");

  static cutlass::Status run(void const* values, void const* e, void const* b, void* y, int m, int n, int k,
                             cudaStream_t stream) {
    using E = typename Gemm::ElementE;
    auto const layout_e = Gemm::LayoutE::packed({m, k / 16});
    typename Gemm::Arguments arguments{{m, n, k},
                                       {static_cast<bfloat16_t const*>(values), k / 2},
                                       {static_cast<bfloat16_t const*>(b), k},
                                       {static_cast<bfloat16_t const*>(y), n},
                                       {static_cast<bfloat16_t*>(y), n},
                                       {const_cast<E*>(static_cast<E const*>(e)), layout_e},
                                       {1.0f}};
    // Refused here: a K that is no multiple of the tile's.
    if (auto status = Gemm::can_implement(arguments); status != cutlass::Status::kSuccess) return status;
    Gemm gemm;
    if (auto status = gemm.initialize(arguments, nullptr, stream); status != cutlass::Status::kSuccess) return status;
    return gemm.run(stream);
  }
};

}  // namespace

#define SPGEMM(name, ...)                                                                                             \
  extern "C" int name(void const* values, void const* e, void const* b, void* y, int m, int n, int k, void* stream) { \
    return static_cast<int>(Spgemm<__VA_ARGS__>::run(values, e, b, y, m, n, k, static_cast<cudaStream_t>(stream)));   \
  }

SPGEMM(spgemm_sm80_128x256_s5, Shape<128, 256, 64>, 5)
SPGEMM(spgemm_sm80_256x128_s3, Shape<256, 128, 64>, 3)

extern "C" char const* spgemm_status(int status) {
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}
