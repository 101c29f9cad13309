#include <cmath>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "ops/mla_cache_write/params.h"

namespace moekern::MOEKERN_ISA {
namespace {

// to = weight * round(x / rms(x)); the rounding to T in between is transformers'.
template <class T>
void normalize(const T* x, const T* weight, T* to, int64_t count, float eps) {
  VecF squares = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF v = load_n(x + i, static_cast<int>(count - i < kLanes ? count - i : kLanes));
    squares = fma(v, v, squares);
  }
  const VecF scale = splat(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(count) + eps));
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    T rounded[kLanes];
    store(rounded, load_n(x + i, n) * scale);
    store_n(to + i, load_n(weight + i, n) * load(rounded), n);
  }
}

template <class T>
void rotate(const T* x, const float* cos, const float* sin, RopeLayout layout, T* to, int64_t half) {
  const int64_t in_step = layout == RopeLayout::kHalf ? 1 : 2,
                in_other = layout == RopeLayout::kHalf ? half : 1;
  const bool interleaved = layout == RopeLayout::kInterleaved;
  const int64_t out_step = interleaved ? 2 : 1, out_other = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i * in_step]), b = to_float(x[i * in_step + in_other]);
    to[i * out_step] = from_float<T>(a * cos[i] - b * sin[i]);
    to[i * out_step + out_other] = from_float<T>(b * cos[i] + a * sin[i]);
  }
}

template <class T, class Slot>
void run(const MlaCacheWriteParams& p) {
  const auto* kv = static_cast<const T*>(p.kv);
  const auto* weight = static_cast<const T*>(p.norm_weight);
  const auto* slots = static_cast<const Slot*>(p.slots);
  auto* latent = static_cast<T*>(p.latent_cache);
  auto* rope = static_cast<T*>(p.rope_cache);
  // About 0.2 us a token: 64 of them are worth a thread.
  parallel_for(p.tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = slots[t];
      if (slot < 0 || slot >= p.num_slots) continue;
      const T* row = kv + t * p.kv_stride;
      normalize(row, weight, latent + slot * p.latent_stride, p.rank, p.eps);
      rotate(row + p.rank, p.cos + t * p.cos_stride, p.sin + t * p.sin_stride, p.layout,
             rope + slot * p.rope_stride, p.rope / 2);
    }
  });
}

}  // namespace

void mla_cache_write(const MlaCacheWriteParams& p) {
  dispatch(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.int64_slots ? run<T, int64_t>(p) : run<T, int32_t>(p);
  });
}

}  // namespace moekern::MOEKERN_ISA
