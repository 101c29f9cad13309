// Cuts the rows of all experts into segments, and those into groups whose packed inputs stay in the outer
// caches.
#pragma once

#include "common/gemm_grouped.h"

namespace moekern::MOEKERN_ISA {

// Row slots of a group: 1536 rows of D = 2048 and F = 1408 in bf16 take 11 MB.
constexpr int kGroupSlots = 1536;

// Calls run(segments, count) for each group. offsets [E+1]: rows of each expert; those past num_rows do not
// exist.
template <class T, class Run>
inline void for_each_group(const int32_t* offsets, int num_experts, int64_t num_rows, int max_k,
                           const Run& run) {
  const int most = segment_rows<T>(max_k);
  Segment segments[kGroupSlots];
  int count = 0;
  int64_t slots = 0;
  const auto flush = [&] {
    if (count > 0) run(segments, count);
    count = 0;
    slots = 0;
  };
  for (int e = 0; e < num_experts; ++e) {
    const int64_t begin = std::clamp<int64_t>(offsets[e], 0, num_rows);
    const int64_t end = std::clamp<int64_t>(offsets[e + 1], 0, num_rows);
    if (begin >= end) continue;
    const int64_t pieces = (end - begin + most - 1) / most;
    const int64_t even = round_up((end - begin + pieces - 1) / pieces, kTile);
    for (int64_t at = begin; at < end; at += even) {
      const int rows = static_cast<int>(std::min(even, end - at));
      const int64_t need = segment_slots<T>(rows);
      if (slots + need > kGroupSlots) flush();
      segments[count++] = {e, rows, at, slots, std::min(rows, kTile)};
      slots += need;
    }
  }
  flush();
}

// Slots that a group of num_rows rows can need at most.
inline int64_t max_slots(int64_t num_rows) { return std::min<int64_t>(kGroupSlots, 2 * num_rows); }

}  // namespace moekern::MOEKERN_ISA
