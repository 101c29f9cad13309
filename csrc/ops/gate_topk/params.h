// gate_topk: router logits -> weights and ids of the selected experts. T tokens, E experts, K per token, G
// groups.
#pragma once

#include <cstdint>

#include "common/cuda_target.h"
#include "common/isa.h"
#include "common/scalar.h"

namespace moekern {

constexpr int kMaxTopK = 64;
constexpr int kMaxExperts = 4096;
constexpr int kMaxCudaExperts = 1024;  // 32 registers a lane; Triton spreads longer rows over warps

// In the order of SCORINGS in moekern/ops/gate_topk/ref.py.
enum class Scoring : int32_t { kSoftmax, kSigmoid, kSqrtSoftplus, kSoftmaxTopk, kSigmoidTopk };

struct GatingParams {
  const float* bias;          // [E] or null; added for the selection only
  const float* expert_scale;  // [E] or null
  Scoring scoring;
  int num_experts;
  int top_k;
  int num_groups;
  int topk_groups;
  bool top2;  // group score: sum of the two best instead of the best
  bool renormalize;
  float norm_eps;
  float norm_min;
  float scale;
};

struct GateTopkParams {
  GatingParams gating;
  const void* logits;       // [T, E], rows logits_stride elements apart
  const void* preselected;  // [T, K] like ids, or null
  float* weights;           // [T, K]
  void* ids;                // [T, K], int64 or int32
  DType dtype;
  bool int64_ids;
  int64_t num_tokens;
  int64_t logits_stride;
};

MOEKERN_CPU_KERNEL(gate_topk, GateTopkParams)
void gate_topk_cuda(const GateTopkParams& p, const CudaTarget& target);

}  // namespace moekern
