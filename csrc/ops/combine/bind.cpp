#include "common/leaf.h"
#include "ops/combine/params.h"

namespace moekern {
namespace {

void combine_cpu_leaf(const Tensor& y, const Tensor& weights, const std::optional<Tensor>& ids,
                      int64_t num_experts, const Tensor& out) {
  CombineParams p{};
  p.y = y.const_data_ptr();
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  p.ids = data_or_null<void>(ids);
  p.out = out.mutable_data_ptr();
  p.dtype = dtype_of(y, "y");
  p.int64_ids = ids.has_value() && ids->scalar_type() == torch::headeronly::ScalarType::Long;
  p.num_tokens = weights.size(0);
  p.y_stride = y.stride(0);
  p.top_k = static_cast<int>(weights.size(1));
  p.width = static_cast<int>(y.size(1));
  p.num_experts = num_experts;
  combine_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) { MOEKERN_LEAF(m, _combine_cpu, moekern::combine_cpu_leaf); }
