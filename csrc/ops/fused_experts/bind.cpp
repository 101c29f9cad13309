#include "common/gemm_bind.h"
#include "ops/fused_experts/params.h"

namespace moekern {
namespace {

void fused_experts_cpu_leaf(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                            const Tensor& weights, const Tensor& ids, const std::optional<Tensor>& b_gate_up,
                            const std::optional<Tensor>& b_down, int64_t activation, bool gated,
                            bool interleaved, bool transposed, double limit, double alpha, double up_shift,
                            const Tensor& rows, const std::optional<Tensor>& out) {
  FusedExpertsParams p{};
  p.up = matrices_of(w_gate_up, b_gate_up, transposed);
  p.down = matrices_of(w_down, b_down, transposed);
  p.activation = activation_of(activation, gated, interleaved, limit, alpha, up_shift);
  p.x = x.const_data_ptr();
  p.ids = ids.const_data_ptr();
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  p.rows = rows.mutable_data_ptr();
  p.out = out.has_value() ? out->mutable_data_ptr() : nullptr;
  p.dtype = dtype_of(x, "x");
  p.int64_ids = ids.scalar_type() == torch::headeronly::ScalarType::Long;
  p.num_tokens = x.size(0);
  p.x_stride = x.stride(0);
  p.top_k = static_cast<int>(ids.size(1));
  p.num_experts = static_cast<int>(w_gate_up.size(0));
  fused_experts_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) {
  MOEKERN_LEAF(m, _fused_experts_cpu, moekern::fused_experts_cpu_leaf);
}
