// fused_experts: the expert layer. T tokens, E experts, K selected experts per token, D model width, F expert
// width.
#pragma once

#include "common/gemm.h"
#include "common/isa.h"

namespace moekern {

struct FusedExpertsParams {
  Matrices up;    // [E, 2F or F, D]
  Matrices down;  // [E, D, F]
  Activation activation;
  const void* x;         // [T, D]
  const void* ids;       // [T, K]
  const float* weights;  // [T, K]
  void* rows;            // [T*K, D]: the pair rows; the result when out is null
  void* out;             // [T, D] or null
  DType dtype;
  bool int64_ids;
  int64_t num_tokens;
  int64_t x_stride;
  int top_k;
  int num_experts;
};

MOEKERN_CPU_KERNEL(fused_experts, FusedExpertsParams)

}  // namespace moekern
