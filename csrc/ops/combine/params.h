// combine: rows of pairs -> weighted sum per token. T tokens, K pairs per token, D width, E experts.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace moekern {

struct CombineParams {
  const void* y;         // [T*K, D], rows y_stride elements apart
  const float* weights;  // [T, K]
  const void* ids;       // [T, K] or null: all pairs count
  void* out;             // [T, D]
  DType dtype;
  bool int64_ids;
  int64_t num_tokens;
  int64_t y_stride;
  int top_k;
  int width;
  int64_t num_experts;
};

MOEKERN_CPU_KERNEL(combine, CombineParams)

}  // namespace moekern
