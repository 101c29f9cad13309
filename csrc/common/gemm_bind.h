// Tensors -> the grouped GEMM's views of them, for bind.cpp files.
#pragma once

#include "common/gemm.h"
#include "common/leaf.h"

namespace moekern {

inline Matrices matrices_of(const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
  Matrices m{};
  m.data = weight.const_data_ptr();
  m.bias = data_or_null<void>(bias);
  m.expert_stride = weight.stride(0);
  m.row_stride = weight.stride(1);
  m.bias_stride = bias.has_value() ? bias->stride(0) : 0;
  m.n = static_cast<int>(weight.size(transposed ? 2 : 1));
  m.k = static_cast<int>(weight.size(transposed ? 1 : 2));
  m.transposed = transposed;
  return m;
}

inline Activation activation_of(int64_t kind, bool gated, bool interleaved, double limit, double alpha,
                                double up_shift) {
  Activation a;
  a.kind = static_cast<ActivationKind>(kind);
  a.gated = gated;
  a.interleaved = interleaved;
  a.limit = static_cast<float>(limit);
  a.alpha = static_cast<float>(alpha);
  a.up_shift = static_cast<float>(up_shift);
  return a;
}

}  // namespace moekern
