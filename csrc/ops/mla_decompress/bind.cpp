#include "common/leaf.h"
#include "ops/mla_decompress/params.h"

namespace moekern {
namespace {

MlaDecompressParams to_params(const Tensor& k_rope, const Tensor& k, const Tensor& v) {
  MlaDecompressParams p{};
  p.k_rope = k_rope.const_data_ptr();
  p.k = k.mutable_data_ptr();
  p.v = v.mutable_data_ptr();
  p.element_size = k.element_size();
  p.batch = k.size(0);
  p.heads = k.size(1);
  p.tokens = k.size(2);
  p.rope = k_rope.size(2);
  p.nope = k.size(3) - p.rope;
  p.v_width = v.size(3);
  for (int i = 0; i < 2; ++i) p.rope_stride[i] = k_rope.stride(i);
  return p;
}

// kv, when given, is latent times w_kv_b [B, S, H * (N + V)]; without it mla_decompress_fits must hold.
void mla_decompress_cpu_leaf(const Tensor& latent, const Tensor& k_rope, const Tensor& w_kv_b,
                             const std::optional<Tensor>& kv, const Tensor& k, const Tensor& v) {
  MlaDecompressParams p = to_params(k_rope, k, v);
  p.value = w_kv_b.size(0) / p.heads - p.nope;
  p.rank = latent.size(2);
  p.latent = latent.const_data_ptr();
  p.w_kv_b = w_kv_b.const_data_ptr();
  p.kv = data_or_null<void>(kv);
  for (int i = 0; i < 2; ++i) p.latent_stride[i] = latent.stride(i);
  p.w_stride = w_kv_b.stride(0);
  STD_TORCH_CHECK(p.kv != nullptr || mla_decompress_fits(dtype_of(k, "latent"), p.rank, p.nope, p.value),
                  "mla_decompress: the product of these shapes is not computed here");
  mla_decompress_cpu(p);
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) {
  MOEKERN_LEAF(m, _mla_decompress_cpu, moekern::mla_decompress_cpu_leaf);
}
