// mla_cache_write: RMS norm of the latent, rotary embedding of the shared key, both into rows of the cache. T
// tokens, R latent rank, P rope width.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace moekern {

// In the order of ROPES in moekern/ops/mla_cache_write/ref.py.
enum class RopeLayout : int32_t { kInterleaved, kHalf, kDeinterleave };

struct MlaCacheWriteParams {
  const void* kv;           // [T, R + P]
  const void* norm_weight;  // [R]
  const float* cos;         // [T, P / 2] or wider
  const float* sin;
  void* latent_cache;  // [num_slots, R]
  void* rope_cache;    // [num_slots, P]
  const void* slots;   // [T]
  DType dtype;
  bool int64_slots;
  RopeLayout layout;
  int64_t tokens, rank, rope, num_slots;
  int64_t kv_stride, cos_stride, sin_stride, latent_stride, rope_stride;  // in elements
  float eps;
};

MOEKERN_CPU_KERNEL(mla_cache_write, MlaCacheWriteParams)

}  // namespace moekern
