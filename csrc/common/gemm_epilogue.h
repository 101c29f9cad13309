// Bias and activation of 16 columns of a product, in fp32.
#pragma once

#include "common/gemm.h"
#include "common/simd_math.h"

namespace moekern::MOEKERN_ISA {

inline VecF apply(ActivationKind kind, float alpha, VecF g) {
  switch (kind) {
    case ActivationKind::kNone: return g;
    case ActivationKind::kSilu: return g / (splat(1.0f) + exp(splat(-alpha) * g));
    case ActivationKind::kGelu: return g * normal_cdf(g);
    case ActivationKind::kGeluTanh: {
      // 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3)
      const VecF inner = g * fma(splat(0.044715f) * g, g, splat(1.0f));
      return g * sigmoid(splat(1.5957691216057308f) * inner);
    }
    case ActivationKind::kRelu: return g < zero() ? zero() : g;
    case ActivationKind::kRelu2: {
      const VecF r = g < zero() ? zero() : g;
      return r * r;
    }
  }
  return g;
}

// Written so that NaN passes through, as torch.clamp lets it.
inline VecF clamp_above(VecF v, float limit) { return v > splat(limit) ? splat(limit) : v; }
inline VecF clamp_both(VecF v, float limit) {
  v = v > splat(limit) ? splat(limit) : v;
  return v < splat(-limit) ? splat(-limit) : v;
}

inline VecF activate_gated(const Activation& a, VecF g, VecF u) {
  return apply(a.kind, a.alpha, clamp_above(g, a.limit)) * (clamp_both(u, a.limit) + splat(a.up_shift));
}

inline VecF activate_plain(const Activation& a, VecF z) {
  if (a.kind == ActivationKind::kNone && a.limit == std::numeric_limits<float>::infinity()) return z;
  return apply(a.kind, a.alpha, clamp_both(z, a.limit));
}

}  // namespace moekern::MOEKERN_ISA
