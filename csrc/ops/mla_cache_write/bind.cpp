#include "common/leaf.h"
#include "ops/mla_cache_write/params.h"

namespace moekern {
namespace {

void mla_cache_write_cpu_leaf(const Tensor& kv, const Tensor& norm_weight, const Tensor& cos,
                              const Tensor& sin, const Tensor& slots, double eps, int64_t layout,
                              const Tensor& latent_cache, const Tensor& rope_cache) {
  MlaCacheWriteParams p{};
  p.kv = kv.const_data_ptr();
  p.norm_weight = norm_weight.const_data_ptr();
  p.cos = static_cast<const float*>(cos.const_data_ptr());
  p.sin = static_cast<const float*>(sin.const_data_ptr());
  p.latent_cache = latent_cache.mutable_data_ptr();
  p.rope_cache = rope_cache.mutable_data_ptr();
  p.slots = slots.const_data_ptr();
  p.dtype = dtype_of(kv, "kv");
  p.int64_slots = slots.scalar_type() == torch::headeronly::ScalarType::Long;
  p.layout = static_cast<RopeLayout>(layout);
  p.tokens = kv.size(0);
  p.rank = norm_weight.size(0);
  p.rope = rope_cache.size(1);
  p.num_slots = latent_cache.size(0);
  p.kv_stride = kv.stride(0);
  p.cos_stride = cos.stride(0);
  p.sin_stride = sin.stride(0);
  p.latent_stride = latent_cache.stride(0);
  p.rope_stride = rope_cache.stride(0);
  p.eps = static_cast<float>(eps);
  mla_cache_write_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) {
  MOEKERN_LEAF(m, _mla_cache_write_cpu, moekern::mla_cache_write_cpu_leaf);
}
