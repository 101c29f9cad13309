#include "common/leaf.h"
#include "ops/gate/params.h"

namespace moekern {
namespace {

void gate_cpu_leaf(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& linear_bias,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& expert_scale,
                   const std::optional<Tensor>& preselected, int64_t scoring, int64_t num_groups,
                   int64_t topk_groups, bool top2, bool renormalize, double norm_eps, double norm_min,
                   double scale, const Tensor& weights, const Tensor& ids, const Tensor& logits) {
  GateParams p{};
  p.gating.bias = data_or_null<float>(bias);
  p.gating.expert_scale = data_or_null<float>(expert_scale);
  p.gating.scoring = static_cast<Scoring>(scoring);
  p.gating.num_experts = static_cast<int>(weight.size(0));
  p.gating.top_k = static_cast<int>(weights.size(1));
  p.gating.num_groups = static_cast<int>(num_groups);
  p.gating.topk_groups = static_cast<int>(topk_groups);
  p.gating.top2 = top2;
  p.gating.renormalize = renormalize;
  p.gating.norm_eps = static_cast<float>(norm_eps);
  p.gating.norm_min = static_cast<float>(norm_min);
  p.gating.scale = static_cast<float>(scale);
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.linear_bias = data_or_null<float>(linear_bias);
  p.preselected = data_or_null<void>(preselected);
  p.weights = static_cast<float*>(weights.mutable_data_ptr());
  p.ids = ids.mutable_data_ptr();
  p.logits = logits.mutable_data_ptr();
  p.x_dtype = dtype_of(x, "x");
  p.weight_dtype = dtype_of(weight, "weight");
  p.logits_dtype = dtype_of(logits, "logits");
  p.int64_ids = ids.scalar_type() == torch::headeronly::ScalarType::Long;
  p.num_tokens = x.size(0);
  p.x_stride = x.stride(0);
  p.weight_stride = weight.stride(0);
  p.width = static_cast<int>(x.size(1));
  gate_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) { MOEKERN_LEAF(m, _gate_cpu, moekern::gate_cpu_leaf); }
