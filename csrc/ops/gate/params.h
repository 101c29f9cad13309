// gate: router GEMM and gating. T tokens, E experts, D model width.
#pragma once

#include "ops/gate_topk/params.h"

namespace moekern {

struct GateParams {
  GatingParams gating;
  const void* x;             // [T, D], rows x_stride elements apart
  const void* weight;        // [E, D], rows weight_stride elements apart
  const float* linear_bias;  // [E] or null
  const void* preselected;   // [T, K] like ids, or null
  float* weights;            // [T, K]
  void* ids;                 // [T, K], int64 or int32
  void* logits;              // [T, E]
  DType x_dtype;
  DType weight_dtype;
  DType logits_dtype;
  bool int64_ids;
  int64_t num_tokens;
  int64_t x_stride;
  int64_t weight_stride;
  int width;  // D
};

MOEKERN_CPU_KERNEL(gate, GateParams)

}  // namespace moekern
