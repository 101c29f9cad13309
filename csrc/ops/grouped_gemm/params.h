// grouped_gemm: rows sorted by expert, times each expert's matrix. M rows, E experts.
#pragma once

#include "common/gemm.h"
#include "common/isa.h"

namespace moekern {

struct GroupedGemmParams {
  Matrices weight;
  Activation activation;
  const void* x;           // [x_rows, K]
  const int32_t* offsets;  // [E+1]
  const int32_t* gather;   // [M] or null
  const float* row_scale;  // [M] or null
  void* out;               // [M, N or N/2]
  DType dtype;
  int64_t x_rows;
  int64_t x_stride;
  int64_t num_rows;
  int num_experts;
};

MOEKERN_CPU_KERNEL(grouped_gemm, GroupedGemmParams)

}  // namespace moekern
