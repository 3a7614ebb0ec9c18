// The GEMM kernels' arguments, as srelu24/launch_sm80.py packs them: keep the two in step.
#pragma once

#include <srelu24/raster.cuh>
#include <srelu24/scale.cuh>

namespace srelu24 {

/// How the CTAs of a tile share its K (split.cuh), in units of 256, a vector of E.
struct SplitKParams {
  cutlass::FastDivmod slices;  // CTAs of a tile
  int32_t units, extra;        // every slice takes `units`, the first `extra` of them one more
  float4* partials;            // what all slices but the last leave, kTileM * kTileN floats each
  int32_t* flags;              // one a tile, zero at launch and again after it
};

/// Arguments of gemm, gemm_relu2_24 and spgemm. Output is [m, n] before packing; k is uncompressed.
struct GemmParams {
  void const* a;          // [m, k], or the packed values [m, k / 2]
  void const* b;          // [n, k]
  uint4 const* metadata;  // spgemm: E of A, [ceil(m / 64)][ceil(k / 256)][128]
  void* out;              // [m, n], or the packed values [m, n / 2]
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
