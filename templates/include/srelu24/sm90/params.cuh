// The arguments of the wgmma GEMM kernels and of a training step's movers, as
// srelu24/runtime/parameters.py lays them out. tests/compile/test_parameters.py holds every field to the place where it is
// packed.
#pragma once

#include <srelu24/raster.cuh>
#include <srelu24/scale.cuh>

namespace srelu24 {

/// A CUtensorMap, encoded by the host.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

/// Stream-K: how the tiles that do not fill a whole wave are split along K (work.cuh). A unit is 256 of K, what a
/// vector of E covers: four k-blocks in 16 bits, two in 8 bits.
struct SplitParams {
  int32_t first_tile;              // tiles from here on are split; the number of tiles when none are
  int32_t units, extra;            // every cluster takes `units`, the first `extra` clusters take one more
  cutlass::FastDivmod tile_units;  // units of one tile
  float4* partials;                // a slot for each consumer warpgroup of the grid: [kTileN / 8][128]
  uint32_t* flags;                 // one for each slot: whether it is filled; zero before and after a launch
};

/// What only the training kernels take: the operand packed along tokens, the S of a backward pass, and the order of
/// rows (srelu24/training/order.py).
struct TokenParams {
  void* values;             // kept values along tokens [m / 2, stride], rows in the order of the groups
  uint32_t* metadata;       // E of its transpose: [ceil(n / 64)][ceil(m / 256)][128][4]
  void const* s;            // gemm_drelu2_24: packed values of S [m, n / 2]
  uint4 const* s_metadata;  // its E, [ceil(m / 64)][ceil(n / 256)][128]
  int64_t stride, s_stride;
  int32_t row_step, block_step;  // tokens from one row of a block of 16 to the next, and from block to block

  __device__ __forceinline__ int64_t token_of(int64_t row) const { return row % 16 * row_step + row / 16 * block_step; }
};

/// Arguments of gemm, gemm_relu2_24 and spgemm. Output is [m, n] before packing; k is uncompressed.
struct GemmParams {
  TensorMap a;              // [m, k]; for spgemm the packed values [m, k / 2]
  TensorMap b_share;        // [n, k] in the row order of LoadOrder, see sm90/tile_load.cuh
  TensorMap b_rows[2];      // the same for a share with a ragged end
  uint4 const* metadata;    // spgemm: E of A, [ceil(m / 64)][ceil(k / 256)][128]
  void* out;                // [m, n]; where the output is packed, its values [m, n / 2]
  uint4* out_metadata;      // gemm_relu2_24: E of the output, [ceil(m / 64)][ceil(n / 256)][128]
  void const* bias;         // [n] or null; fp32 where operands have scales
  void const* residual;     // [m, n] or null
  int32_t* counts;          // gemm_relu2_24: non-zeros per feature [n], added to, or null
  int64_t out_stride;       // elements between rows of out
  int64_t residual_stride;  // elements between rows of residual
  int32_t m, n, k;
  int32_t k_blocks;
  RasterParams raster;
  SplitParams split;
  ScaleParams scale;
  TokenParams tokens;
};

/// Arguments of transpose. Input is [m, n] in 16 bits.
struct TransposeParams {
  void const* in;
  void* out;  // [n, m]
  int64_t in_stride, out_stride;
  int32_t m, n;
};

/// Arguments of dense_columns. Input is a packed [m, n] in 16 bits, rows as in TokenParams.
struct DenseColumnsParams {
  void const* values;        // [m, n / 2]
  uint32_t const* metadata;  // E, [ceil(m / 64)][ceil(n / 256)][128][4]
  int64_t const* columns;    // [count]
  void* out;                 // [m, count], or null
  void* token_values;        // kept values along tokens [m / 2, n], zeroed in these columns, or null
  int64_t stride, token_stride;
  int32_t m, n, count;
  int32_t row_step, block_step;
};

}  // namespace srelu24
