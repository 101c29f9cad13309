#include "common/leaf.h"
#include "common/parallel.h"
#include "ops/mla_decode/params.h"

namespace moekern {
namespace {

MlaDecodeParams to_params(const Tensor& q, const Tensor& latent, const Tensor& k_rope, const Tensor& w_kv_b,
                          const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& block_table, double scale, bool causal,
                          int64_t num_splits, const Tensor& workspace, const Tensor& out, const Tensor& lse) {
  MlaDecodeParams p{};
  p.q = q.const_data_ptr();
  p.latent = latent.const_data_ptr();
  p.k_rope = k_rope.const_data_ptr();
  p.w_kv_b = w_kv_b.const_data_ptr();
  p.lengths = data_or_null<int32_t>(lengths);
  p.mask = data_or_null<uint8_t>(mask);
  p.block_table = data_or_null<int32_t>(block_table);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  p.dtype = dtype_of(q, "q");
  p.batch = q.size(0);
  p.queries = q.size(1);
  p.heads = q.size(2);
  p.rank = latent.size(2);
  p.rope = k_rope.size(2);
  p.nope = q.size(3) - p.rope;
  p.value = out.size(3);
  p.page_size = latent.size(1);
  p.num_pages = latent.size(0);
  p.positions = p.page_size * (block_table.has_value() ? block_table->size(1) : 1);
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i);
  for (int i = 0; i < 2; ++i) {
    p.latent_stride[i] = latent.stride(i);
    p.rope_stride[i] = k_rope.stride(i);
    if (block_table.has_value()) p.table_stride[i] = block_table->stride(i);
  }
  p.w_stride = w_kv_b.stride(0);
  if (mask.has_value()) {
    p.mask_stride[0] = mask->size(0) == 1 ? 0 : mask->stride(0);
    p.mask_stride[1] = mask->stride(1);
    p.mask_stride[2] = mask->stride(2);
  }
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.num_splits = num_splits;
  p.num_threads = num_threads();
  STD_TORCH_CHECK(workspace.numel() >= p.workspace_size(), "mla_decode: workspace must hold ",
                  p.workspace_size(), " floats; got ", workspace.numel());
  return p;
}

void mla_decode_cpu_leaf(const Tensor& q, const Tensor& latent, const Tensor& k_rope, const Tensor& w_kv_b,
                         const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& block_table, double scale, bool causal,
                         int64_t num_splits, const Tensor& workspace, const Tensor& out, const Tensor& lse) {
  mla_decode_cpu(to_params(q, latent, k_rope, w_kv_b, lengths, mask, block_table, scale, causal, num_splits,
                           workspace, out, lse));
}

}  // namespace
}  // namespace moekern

STABLE_TORCH_LIBRARY_IMPL(moekern, CPU, m) { MOEKERN_LEAF(m, _mla_decode_cpu, moekern::mla_decode_cpu_leaf); }
