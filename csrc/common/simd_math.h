// Elementwise functions of a vector of fp32, on top of exp in simd.h.
#pragma once

#include "common/simd.h"

namespace moekern::MOEKERN_ISA {

inline VecF sigmoid(VecF x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// Probability that a standard normal variable is below x, within 3e-7 of itself (not of 1) down to x = -13:
// the upper tail is exp(-a^2/2) t p(t) with t = 1/(1 + 0.35 a), p a minimax fit of degree 8 on a in [0, 14].
inline VecF normal_cdf(VecF x) {
  const VecF a = x < zero() ? -x : x;
  const VecF t = splat(1.0f) / fma(splat(0.35f), a, splat(1.0f));
  VecF p = splat(-0.0291459393f);
  p = fma(p, t, splat(0.143971741f));
  p = fma(p, t, splat(-0.255714357f));
  p = fma(p, t, splat(0.159174263f));
  p = fma(p, t, splat(-0.0231099036f));
  p = fma(p, t, splat(0.105508029f));
  p = fma(p, t, splat(0.119832858f));
  p = fma(p, t, splat(0.139861867f));
  p = fma(p, t, splat(0.139621407f));
  const VecF tail = exp(splat(-0.5f) * a * a) * t * p;
  return x < zero() ? tail : splat(1.0f) - tail;
}

}  // namespace moekern::MOEKERN_ISA
