// The arguments of the mma.sync GEMM kernels, as srelu24/runtime/parameters.py lays them out. tests/compile/test_parameters.py
// holds every field to the place where it is packed.
#pragma once

#include <srelu24/raster.cuh>
#include <srelu24/scale.cuh>

namespace srelu24 {

/// How the CTAs of a tile share its K (split.cuh). A unit is 256 of K, what a vector of E covers.
struct SplitKParams {
  cutlass::FastDivmod slices;  // CTAs of a tile
  int32_t units, extra;        // every slice takes `units`, the first `extra` slices take one more
  float4* partials;            // what all slices but the last leave, kTileM * kTileN floats each
  int32_t* flags;              // one for each tile: slices that have arrived; zero before and after a launch
};

/// Arguments of gemm, gemm_relu2_24 and spgemm. Output is [m, n] before packing; k is uncompressed.
struct GemmParams {
  void const* a;          // [m, k]; for spgemm the packed values [m, k / 2]
  void const* b;          // [n, k]
  uint4 const* metadata;  // spgemm: E of A, [ceil(m / 64)][ceil(k / 256)][128]
  void* out;              // [m, n]; for gemm_relu2_24 the packed values [m, n / 2]
  uint4* out_metadata;    // gemm_relu2_24: E of the output, [ceil(m / 64)][ceil(n / 256)][128]
  void const* bias;       // [n] or null; fp32 where operands have scales
  void const* residual;   // [m, n] or null
  int32_t* counts;        // gemm_relu2_24: non-zeros per feature [n], added to, or null
  int64_t a_stride;       // elements between rows
  int64_t b_stride;
  int64_t out_stride;
  int64_t residual_stride;
  int32_t m, n, k;
  int32_t k_blocks;
  RasterParams raster;
  ScaleParams scale;
  SplitKParams split;
};

}  // namespace srelu24
