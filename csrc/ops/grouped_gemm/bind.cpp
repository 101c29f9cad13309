#include "common/gemm_bind.h"
#include "ops/grouped_gemm/params.h"

namespace moekern {
namespace {

void grouped_gemm_cpu_leaf(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                           const std::optional<Tensor>& gather, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& row_scale, int64_t activation, bool gated,
                           bool interleaved, bool transposed, double limit, double alpha, double up_shift,
                           const Tensor& out) {
  GroupedGemmParams p{};
  p.weight = matrices_of(weight, bias, transposed);
  p.activation = activation_of(activation, gated, interleaved, limit, alpha, up_shift);
  p.x = x.const_data_ptr();
  p.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
  p.gather = data_or_null<int32_t>(gather);
  p.row_scale = data_or_null<float>(row_scale);
  p.out = out.mutable_data_ptr();
  p.dtype = dtype_of(x, "x");
  p.x_rows = x.size(0);
  p.x_stride = x.stride(0);
  p.num_rows = out.size(0);
  p.num_experts = static_cast<int>(weight.size(0));
  grouped_gemm_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) {
  MOEKERN_LEAF(m, _grouped_gemm_cpu, moekern::grouped_gemm_cpu_leaf);
}
