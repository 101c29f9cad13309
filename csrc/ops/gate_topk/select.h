// One token's gating on a CPU, shared by gate_topk and gate: scores, selection and weights from a row of fp32
// logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"
#include "ops/gate_topk/params.h"

namespace moekern::MOEKERN_ISA {

// Scratch of one thread.
struct GatingScratch {
  alignas(64) float logits[kMaxExperts];
  alignas(64) float scores[kMaxExperts];
  alignas(64) float choice[kMaxExperts];
};

constexpr float kLowest = -std::numeric_limits<float>::max();  // what NaN and -inf rank as
constexpr float kMasked = -std::numeric_limits<float>::infinity();

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Stable softmax of n values; NaN in, NaN out.
inline void softmax(const float* x, float* y, int n) {
  float best = kMasked;
  for (int i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  if (best == kMasked) best = std::isnan(x[0]) ? x[0] : best;
  VecF sum = zero();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF e = exp(load(x + i) - splat(best));
    store(y + i, e);
    sum += e;
  }
  if (i < n) {
    const VecF e = exp(load_n(x + i, n - i) - splat(best));
    store_n(y + i, e, n - i);
    for (int j = 0; j < n - i; ++j) sum[j] += e[j];
  }
  const float inverse = 1.0f / reduce_add(sum);
  for (int j = 0; j < n; ++j) y[j] *= inverse;
}

inline void score_all(const GatingParams& g, const float* logits, float* scores) {
  const int n = g.num_experts;
  switch (g.scoring) {
    case Scoring::kSoftmax: return softmax(logits, scores, n);
    case Scoring::kSigmoid:
      for (int i = 0; i < n; i += kLanes) {
        const VecF one = splat(1.0f);
        store_n(scores + i, one / (one + exp(-load_n(logits + i, n - i))), n - i);
      }
      return;
    case Scoring::kSqrtSoftplus:
      for (int i = 0; i < n; ++i) scores[i] = std::sqrt(softplus(logits[i]));
      return;
    case Scoring::kSoftmaxTopk:
    case Scoring::kSigmoidTopk: std::copy(logits, logits + n, scores); return;
  }
}

// Index of the largest of n values, the first of equals; -1 when all are masked or taken.
inline int argmax(const float* x, int n) {
  VecF best = splat(kMasked);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) best = vmax(load(x + i), best);
  float top = reduce_max(best);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  if (top == kMasked) return -1;
  for (int j = 0; j < n; ++j) {
    if (x[j] == top) return j;
  }
  return -1;
}

inline float group_score(const float* x, int n, bool top2) {
  float first = kMasked, second = kMasked;
  for (int i = 0; i < n; ++i) {
    if (x[i] > first) {
      second = first;
      first = x[i];
    } else if (x[i] > second) {
      second = x[i];
    }
  }
  return top2 && n > 1 ? std::max(first + second, kLowest) : first;
}

inline void mask_groups(const GatingParams& g, float* choice) {
  const int size = g.num_experts / g.num_groups;
  float scores[kMaxExperts];
  bool kept[kMaxExperts] = {};
  for (int i = 0; i < g.num_groups; ++i) scores[i] = group_score(choice + i * size, size, g.top2);
  for (int k = 0; k < g.topk_groups; ++k) {
    const int best = argmax(scores, g.num_groups);
    kept[best] = true;
    scores[best] = kMasked;
  }
  for (int i = 0; i < g.num_groups; ++i) {
    if (!kept[i]) std::fill(choice + i * size, choice + (i + 1) * size, kMasked);
  }
}

// Weights of the given ids (an id outside [0, E) gets 0) from scores of all experts.
template <class Id>
inline void weigh(const GatingParams& g, const float* scores, const Id* ids, float* weights) {
  const auto valid = [&](int k) { return ids[k] >= 0 && ids[k] < g.num_experts; };
  for (int k = 0; k < g.top_k; ++k) weights[k] = valid(k) ? scores[ids[k]] : 0.0f;
  if (g.scoring == Scoring::kSigmoidTopk) {
    for (int k = 0; k < g.top_k; ++k) weights[k] = valid(k) ? sigmoid(weights[k]) : 0.0f;
  } else if (g.scoring == Scoring::kSoftmaxTopk) {
    float best = kMasked, sum = 0.0f;
    for (int k = 0; k < g.top_k; ++k) best = valid(k) && !(weights[k] <= best) ? weights[k] : best;
    for (int k = 0; k < g.top_k; ++k) sum += weights[k] = valid(k) ? std::exp(weights[k] - best) : 0.0f;
    for (int k = 0; k < g.top_k; ++k) weights[k] = valid(k) ? weights[k] / sum : 0.0f;
  }
  float factor = g.scale;
  if (g.renormalize) {
    float sum = 0.0f;
    for (int k = 0; k < g.top_k; ++k) sum += weights[k];
    const float bounded = sum + g.norm_eps < g.norm_min ? g.norm_min : sum + g.norm_eps;
    for (int k = 0; k < g.top_k; ++k) weights[k] /= bounded;
  }
  for (int k = 0; k < g.top_k; ++k) {
    weights[k] *= factor;
    if (g.expert_scale != nullptr && valid(k)) weights[k] *= g.expert_scale[ids[k]];
  }
}

// Selects and weighs one token's experts; `given` are preselected ids or null.
template <class Id>
inline void gate_token(const GatingParams& g, GatingScratch& s, const Id* given, float* weights, Id* ids) {
  const int n = g.num_experts;
  score_all(g, s.logits, s.scores);
  if (given != nullptr) {
    std::copy(given, given + g.top_k, ids);
    return weigh(g, s.scores, ids, weights);
  }
  for (int i = 0; i < n; ++i) {
    const float c = g.bias == nullptr ? s.scores[i] : s.scores[i] + g.bias[i];
    s.choice[i] = c >= kLowest ? c : kLowest;  // NaN and -inf too
  }
  if (g.num_groups > 1) mask_groups(g, s.choice);
  for (int k = 0; k < g.top_k; ++k) {
    const int best = argmax(s.choice, n);
    ids[k] = static_cast<Id>(best);
    s.choice[best] = kMasked;
  }
  weigh(g, s.scores, ids, weights);
}

}  // namespace moekern::MOEKERN_ISA
