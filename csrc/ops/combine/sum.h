// Weighted sum of a token's pair rows; shared by combine and fused_experts.
#pragma once

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "ops/combine/params.h"

namespace moekern::MOEKERN_ISA {

inline bool pair_counts(const CombineParams& p, int64_t pair) {
  if (p.ids == nullptr) return true;
  const int64_t id =
      p.int64_ids ? static_cast<const int64_t*>(p.ids)[pair] : static_cast<const int32_t*>(p.ids)[pair];
  return id >= 0 && id < p.num_experts;
}

template <class T>
inline void sum_pairs(const CombineParams& p) {
  const auto* y = static_cast<const T*>(p.y);
  auto* out = static_cast<T*>(p.out);
  const int64_t grain = 1 + (int64_t{1} << 15) / (static_cast<int64_t>(p.width) * p.top_k + 1);
  parallel_for(p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int i = 0; i < p.width; i += kLanes) {
        VecF sum = zero();
        for (int64_t pair = t * p.top_k; pair < (t + 1) * p.top_k; ++pair) {
          if (!pair_counts(p, pair)) continue;
          sum = fma(load_n(y + pair * p.y_stride + i, p.width - i), splat(p.weights[pair]), sum);
        }
        store_n(out + t * p.width + i, sum, p.width - i);
      }
    }
  });
}

}  // namespace moekern::MOEKERN_ISA
