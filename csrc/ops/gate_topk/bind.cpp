#include "ops/gate_topk/bind_gating.h"
#ifdef MOEKERN_HAVE_CUDA
#include "common/torch_cuda.h"
#endif

namespace moekern {
namespace {

using torch::headeronly::ScalarType;

GateTopkParams to_params(const Tensor& logits, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& expert_scale, const std::optional<Tensor>& preselected,
                         int64_t scoring, int64_t num_groups, int64_t topk_groups, bool top2,
                         bool renormalize, double norm_eps, double norm_min, double scale,
                         const Tensor& weights, const Tensor& ids) {
  GateTopkParams p{};
  p.gating = gating_params(logits.size(1), weights.size(1), bias, expert_scale, scoring, num_groups,
                           topk_groups, top2, renormalize, norm_eps, norm_min, scale);
  p.logits = logits.const_data_ptr();
  p.preselected = data_or_null<void>(preselected);
  p.weights = static_cast<float*>(weights.mutable_data_ptr());
  p.ids = ids.mutable_data_ptr();
  p.dtype = dtype_of(logits, "logits");
  p.int64_ids = ids.scalar_type() == ScalarType::Long;
  p.num_tokens = logits.size(0);
  p.logits_stride = logits.stride(0);
  return p;
}

void gate_topk_cpu_leaf(const Tensor& logits, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& expert_scale, const std::optional<Tensor>& preselected,
                        int64_t scoring, int64_t num_groups, int64_t topk_groups, bool top2, bool renormalize,
                        double norm_eps, double norm_min, double scale, const Tensor& weights,
                        const Tensor& ids) {
  gate_topk_cpu(to_params(logits, bias, expert_scale, preselected, scoring, num_groups, topk_groups, top2,
                          renormalize, norm_eps, norm_min, scale, weights, ids));
}

#ifdef MOEKERN_HAVE_CUDA
void gate_topk_cuda_leaf(const Tensor& logits, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& expert_scale, const std::optional<Tensor>& preselected,
                         int64_t scoring, int64_t num_groups, int64_t topk_groups, bool top2,
                         bool renormalize, double norm_eps, double norm_min, double scale,
                         const Tensor& weights, const Tensor& ids) {
  const CudaScope scope(logits);
  gate_topk_cuda(to_params(logits, bias, expert_scale, preselected, scoring, num_groups, topk_groups, top2,
                           renormalize, norm_eps, norm_min, scale, weights, ids),
                 scope.target());
}
#endif

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) { MOEKERN_LEAF(m, _gate_topk_cpu, moekern::gate_topk_cpu_leaf); }
#ifdef MOEKERN_HAVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(moekern, CUDA, m) {
  MOEKERN_LEAF(m, _gate_topk_cuda, moekern::gate_topk_cuda_leaf);
}
#endif
