// The gating arguments of the leaves of gate_topk and gate.
#pragma once

#include "common/leaf.h"
#include "ops/gate_topk/params.h"

namespace moekern {

inline GatingParams gating_params(int64_t num_experts, int64_t top_k, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& expert_scale, int64_t scoring,
                                  int64_t num_groups, int64_t topk_groups, bool top2, bool renormalize,
                                  double norm_eps, double norm_min, double scale) {
  GatingParams g{};
  g.bias = data_or_null<float>(bias);
  g.expert_scale = data_or_null<float>(expert_scale);
  g.scoring = static_cast<Scoring>(scoring);
  g.num_experts = static_cast<int>(num_experts);
  g.top_k = static_cast<int>(top_k);
  g.num_groups = static_cast<int>(num_groups);
  g.topk_groups = static_cast<int>(topk_groups);
  g.top2 = top2;
  g.renormalize = renormalize;
  g.norm_eps = static_cast<float>(norm_eps);
  g.norm_min = static_cast<float>(norm_min);
  g.scale = static_cast<float>(scale);
  return g;
}

}  // namespace moekern
