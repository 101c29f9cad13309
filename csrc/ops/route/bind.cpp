#include "common/leaf.h"
#include "ops/route/params.h"

namespace moekern {
namespace {

void route_cpu_leaf(const Tensor& ids, const Tensor& perm, const Tensor& offsets, const Tensor& counts) {
  RouteParams p{};
  p.ids = ids.const_data_ptr();
  p.perm = static_cast<int32_t*>(perm.mutable_data_ptr());
  p.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.num_pairs = ids.numel();
  p.num_experts = static_cast<int>(counts.size(0));
  p.int64_ids = ids.scalar_type() == torch::headeronly::ScalarType::Long;
  route_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) { MOEKERN_LEAF(m, _route_cpu, moekern::route_cpu_leaf); }
