#include "ops/gate/params.h"
#include "ops/gate_topk/bind_gating.h"

namespace moekern {
namespace {

void gate_cpu_leaf(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& linear_bias,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& expert_scale,
                   const std::optional<Tensor>& preselected, int64_t scoring, int64_t num_groups,
                   int64_t topk_groups, bool top2, bool renormalize, double norm_eps, double norm_min,
                   double scale, const Tensor& weights, const Tensor& ids, const Tensor& logits) {
  GateParams p{};
  p.gating = gating_params(weight.size(0), weights.size(1), bias, expert_scale, scoring, num_groups,
                           topk_groups, top2, renormalize, norm_eps, norm_min, scale);
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
