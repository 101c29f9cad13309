// Grouped GEMM on a CPU: what the ops hand to it. E experts, N columns of a product, K its inner width (not
// top-k).
//
// Products are computed as W x^T, 16 weight rows by up to 16 tokens at a time, so that weights stream from
// memory in the layout they are stored in and nothing is padded for a single token.
#pragma once

#include <cstdint>
#include <limits>

#include "common/scalar.h"

namespace moekern {

// In the order of ACTIVATIONS in moekern/ops/grouped_gemm/activation.py.
enum class ActivationKind : int32_t { kNone, kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

struct Activation {
  ActivationKind kind = ActivationKind::kNone;
  bool gated = false;        // act(gate) * (up + up_shift)
  bool interleaved = false;  // even columns gate, odd up; otherwise the first half is gate
  float limit = std::numeric_limits<float>::infinity();
  float alpha = 1.0f;
  float up_shift = 0.0f;
};

struct Matrices {
  const void* data;       // [E, N, K], or [E, K, N] when transposed; last dimension contiguous
  const void* bias;       // [E, N] in the dtype of data, or null
  int64_t expert_stride;  // elements
  int64_t row_stride;
  int64_t bias_stride;
  int n;
  int k;
  bool transposed;
};

// Consecutive rows (in the order sorted by expert) of one expert, few enough for their inputs to stay in L2.
struct Segment {
  int expert;
  int rows;
  int64_t first;  // position in the sorted order
  int64_t slot;   // first row slot in the packed inputs
  int width;      // tokens of a panel: min(rows, 16)
};

}  // namespace moekern
