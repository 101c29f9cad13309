// mla_decompress: latents and rotary keys -> keys and values of all heads. B batch, S tokens, H heads, R
// latent rank, N nope width, P rope width, V value width, W >= V the width of the rows of v.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace moekern {

struct MlaDecompressParams {
  const void* latent;  // [B, S, R]; null when kv is given
  const void* w_kv_b;  // [H * (N + V), R]
  const void* kv;      // [B, S, H, N + V] contiguous, the product computed elsewhere, or null
  const void* k_rope;  // [B, S, P]
  void* k;             // [B, H, S, N + P], contiguous
  void* v;             // [B, H, S, W], contiguous
  int64_t element_size;
  int64_t batch, tokens, heads, rank, nope, rope, value, v_width;
  int64_t latent_stride[2];  // strides in elements
  int64_t rope_stride[2];
  int64_t w_stride;
};

// From kv, or, where mla_decompress_fits, from latent and w_kv_b.
MOEKERN_CPU_KERNEL(mla_decompress, MlaDecompressParams)

// The product is computed here on AMX, in bf16 and whole tiles; elsewhere torch's is as fast.
inline bool mla_decompress_fits(DType dtype, int64_t rank, int64_t nope, int64_t value) {
  return cpu_isa() == Isa::kAmx && dtype == DType::kBFloat16 && rank % 32 == 0 && nope % 32 == 0 &&
         value % 32 == 0;
}

}  // namespace moekern
