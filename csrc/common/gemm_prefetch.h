// Asks for the weights of a thread's next item while it computes the present one.
#pragma once

#include "common/gemm_pack.h"

#if defined(__AVX512BF16__)

namespace moekern::MOEKERN_ISA {

// Asks for weights that will be read soon, in the order of memory, some lines with each step.
class Prefetcher {
 public:
  Prefetcher() = default;
  Prefetcher(const RowGroup<bfloat16> g[2], int k, int steps) {
    if (g[0].depth != 1 || steps == 0) return;
    int64_t bytes = 0;
    for (int i = 0; i < 2; ++i) {
      // Rows with wide gaps between them are left to the hardware; interleaved groups span each other.
      if (g[i].rows == 0 || g[i].row > 2 * k) continue;
      const auto* from = reinterpret_cast<const char*>(g[i].w);
      if (from < end_[0] && from > begin_[0]) continue;
      begin_[i] = from;
      end_[i] = from + ((g[i].rows - 1) * g[i].row + k) * 2;
      bytes += end_[i] - from;
    }
    at_ = begin_[0];
    per_step_ = static_cast<int>((bytes / 64 + steps) / steps);
  }
  void step() {
    for (int n = 0; n < per_step_; ++n) {
      if (at_ >= end_[range_]) {
        if (range_ == 1) return;
        range_ = 1;
        at_ = begin_[1];
        if (at_ == nullptr) {
          per_step_ = 0;
          return;
        }
      }
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += 64;
    }
  }

 private:
  const char* at_ = nullptr;
  const char* begin_[2] = {};
  const char* end_[2] = {};
  int range_ = 0, per_step_ = 0;
};

}  // namespace moekern::MOEKERN_ISA

#endif
