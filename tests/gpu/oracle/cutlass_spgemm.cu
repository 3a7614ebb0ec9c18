// CUTLASS's own sparse GEMM for Hopper, as CollectiveBuilder makes it, behind a C interface.
// It shares no code with the kernels under test: an independent opinion on what values and E mean.
// Modelled on CUTLASS's example 62_hopper_sparse_gemm.

#include <cstdint>

#include "cutlass/cutlass.h"

#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace {

using namespace cute;

// Y [M, N] row-major = S [M, K] B^T, B [N, K] row-major; fp32 sums.
template <class Element, class Output, class TileShape, class ClusterShape>
struct Spgemm {
  static constexpr int kAlignment = 16 / sizeof(Element), kOutputAlignment = 16 / sizeof(Output);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor, kOutputAlignment,
      Output, cutlass::layout::RowMajor, kOutputAlignment,
      cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor, kAlignment,
      Element, cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Config = typename Mainloop::SparseConfig;
  // tests/compile/cutlass_layout.cpp prints the layouts of this type; here it is seen to be what the builder chose.
  static_assert(
      is_same_v<Config, cutlass::Sm90GemmSparseConfig<sparse_elem<2, Element>, GMMA::Major::K, sparse_elem<8, uint8_t>,
                                                      decltype(size<2>(TileShape{}))>>);

  static cutlass::Status run(void const* values, void const* e, void const* b, void* y, int m, int n, int k,
                             cudaStream_t stream) {
    auto problem = make_shape(m, n, k, 1);
    auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(n, k, 1));
    auto stride_y = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(m, n, 1));
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        problem,
        {static_cast<Element const*>(values), Config::fill_layoutA(problem), static_cast<Element const*>(b), stride_b,
         static_cast<typename Mainloop::ElementE const*>(e), Config::fill_layoutE(problem)},
        {{1.0f, 0.0f}, nullptr, {}, static_cast<Output*>(y), stride_y}};

    // Refused here: sizes that CUTLASS does not take, such as a K that is no multiple of 16. No workspace is given.
    if (auto status = Gemm::can_implement(arguments); status != cutlass::Status::kSuccess) return status;
    if (Gemm::get_workspace_size(arguments) != 0) return cutlass::Status::kErrorWorkspaceNull;
    Gemm gemm;
    return gemm.run(arguments, nullptr, stream);
  }
};

// One kernel for each width of E's atom that our tiles could use; element type and cluster differ as well.
using Bf16K64 = Spgemm<cutlass::bfloat16_t, cutlass::bfloat16_t, Shape<_128, _256, _64>, Shape<_2, _1, _1>>;
using Fp16K128 = Spgemm<cutlass::half_t, cutlass::half_t, Shape<_128, _128, _128>, Shape<_1, _1, _1>>;
using E4m3K128 = Spgemm<cutlass::float_e4m3_t, cutlass::bfloat16_t, Shape<_128, _256, _128>, Shape<_2, _1, _1>>;

}  // namespace

#define SPGEMM(name, type)                                                                                            \
  extern "C" int name(void const* values, void const* e, void const* b, void* y, int m, int n, int k, void* stream) { \
    return static_cast<int>(type::run(values, e, b, y, m, n, k, static_cast<cudaStream_t>(stream)));                  \
  }

SPGEMM(spgemm_bf16_k64, Bf16K64)
SPGEMM(spgemm_fp16_k128, Fp16K128)
SPGEMM(spgemm_e4m3_k128, E4m3K128)

extern "C" char const* spgemm_status(int status) {
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}
