// Counting sort of pairs by expert, stable; shared by route and fused_experts.
#pragma once

#include <algorithm>
#include <cstdint>

namespace moekern::MOEKERN_ISA {

// The order of the pairs that have an expert goes to perm[0, offsets[E]); what is behind stays as it is.
template <class Id>
inline void sort_pairs(const Id* ids, int64_t num_pairs, int num_experts, int32_t* perm, int32_t* offsets,
                       int32_t* counts) {
  const auto valid = [&](int64_t i) { return ids[i] >= 0 && ids[i] < num_experts; };
  std::fill(counts, counts + num_experts, 0);
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (valid(i)) ++counts[ids[i]];
  }
  offsets[0] = 0;
  for (int e = 0; e < num_experts; ++e) offsets[e + 1] = offsets[e] + counts[e];
  // counts serves as the cursor and is restored by the pass itself.
  std::fill(counts, counts + num_experts, 0);
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (valid(i)) perm[offsets[ids[i]] + counts[ids[i]]++] = static_cast<int32_t>(i);
  }
}

}  // namespace moekern::MOEKERN_ISA
