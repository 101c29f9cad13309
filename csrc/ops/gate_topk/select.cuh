// One token's gating by one warp, everything in registers. Lane l holds experts l, l + 32, l + 64, ...
// T tokens, E experts, K selected, G groups.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>

#include "common/warp.cuh"
#include "ops/gate_topk/params.h"

namespace moekern::gating {

constexpr int kTaken = INT_MIN;  // key of padding, of a masked group and of what was selected
constexpr int kSelections = kMaxTopK / warp::kSize;  // selections a lane holds: k = lane and k = lane + 32

// int32 keys in the order of the values: NaN and -inf as the lowest finite one, -0.0 as 0.0; always > kTaken.
MOEKERN_HD int ordered_key(float x) {
  x = x >= -FLT_MAX ? x : -FLT_MAX;
  const int bits = static_cast<int>(float_to_bits(x));
  const int key = bits ^ ((bits >> 31) & INT_MAX);
  return key == -1 ? 0 : key;
}

// The value whose ordered_key this is.
MOEKERN_HD float key_value(int key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & INT_MAX)));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

struct Softmax {
  float max = 0.0f, inverse = 0.0f;
};

__device__ __forceinline__ float score(Scoring scoring, float x, const Softmax& row) {
  switch (scoring) {
    case Scoring::kSoftmax: return expf(x - row.max) * row.inverse;
    case Scoring::kSigmoid: return sigmoid(x);
    case Scoring::kSqrtSoftplus: return sqrtf(softplus(x));
    default: return x;
  }
}

// Maximum and reciprocal sum of a row. Padding is -inf, which adds 0; a NaN reaches every score through the
// sum.
template <int kItems>
__device__ __forceinline__ Softmax softmax_of(const float (&x)[kItems]) {
  Softmax row;
  float best = x[0], sum = 0.0f;
#pragma unroll
  for (int i = 1; i < kItems; ++i) best = fmaxf(best, x[i]);
  row.max = warp::reduce_max(best);
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum += expf(x[i] - row.max);
  row.inverse = 1.0f / warp::reduce_add(sum);
  return row;
}

// Where the largest of the warp's keys is: the lowest index i * 32 + lane that holds it.
template <int kItems>
__device__ __forceinline__ int argmax(const int (&key)[kItems]) {
  int best = key[0], at = INT_MAX;
#pragma unroll
  for (int i = 1; i < kItems; ++i) best = max(best, key[i]);
  best = warp::reduce_max(best);
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) at = key[i] == best ? i * warp::kSize + warp::lane() : at;
  return warp::reduce_min(at);
}

template <int kItems>
__device__ __forceinline__ void set(int (&key)[kItems], int at, int value) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) key[i] = i * warp::kSize + warp::lane() == at ? value : key[i];
}

// kTaken for every expert outside the topk_groups best groups.
template <int kItems>
__device__ __forceinline__ void keep_best_groups(const GatingParams& g, int (&key)[kItems]) {
  static_assert(kItems <= 32, "one bit of `eligible` for each");
  const int size = g.num_experts / g.num_groups;
  const auto in_group = [&](int i, int group) {
    return static_cast<unsigned>(i * warp::kSize + warp::lane() - group * size) < static_cast<unsigned>(size);
  };
  int group_key[kItems];  // held like the experts: lane l has groups l, l + 32, ...
#pragma unroll
  for (int i = 0; i < kItems; ++i) group_key[i] = kTaken;
#pragma unroll 1
  for (int group = 0; group < g.num_groups; ++group) {
    int first = kTaken, second = kTaken;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int k = in_group(i, group) ? key[i] : kTaken;
      second = max(second, min(first, k));
      first = max(first, k);
    }
    int value = warp::reduce_max(first);
    if (g.top2 && size > 1) {
      // One lane gives up its best: tied maxima are the two best.
      const int owner = __ffs(static_cast<int>(warp::ballot(first == value))) - 1;
      const int next = warp::reduce_max(warp::lane() == owner ? second : first);
      value = ordered_key(key_value(value) + key_value(next));
    }
    set(group_key, group, value);
  }
  unsigned eligible = 0;
#pragma unroll 1
  for (int n = 0; n < g.topk_groups; ++n) {
    const int group = argmax(group_key);
    set(group_key, group, kTaken);
#pragma unroll
    for (int i = 0; i < kItems; ++i) eligible |= (in_group(i, group) ? 1u : 0u) << i;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) key[i] = (eligible >> i & 1u) != 0 ? key[i] : kTaken;
}

// Ids of the K largest keys: this lane's are selections lane and lane + 32.
template <int kItems>
__device__ __forceinline__ void select(const GatingParams& g, int (&key)[kItems], int (&ids)[kSelections]) {
#pragma unroll 1
  for (int k = 0; k < g.top_k; ++k) {
    const int at = argmax(key);
    set(key, at, kTaken);
#pragma unroll
    for (int h = 0; h < kSelections; ++h) ids[h] = k == h * warp::kSize + warp::lane() ? at : ids[h];
  }
}

// Weights of the selected: logits[h] of the expert that this lane's selection h names, if it is valid.
__device__ __forceinline__ void weigh(const GatingParams& g, const Softmax& row,
                                      const int (&ids)[kSelections], const bool (&valid)[kSelections],
                                      const float (&logits)[kSelections], float (&weights)[kSelections]) {
  if (g.scoring == Scoring::kSoftmaxTopk) {
    float best = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int h = 0; h < kSelections; ++h) best = valid[h] ? fmaxf(best, logits[h]) : best;
    best = warp::reduce_max(best);
#pragma unroll
    for (int h = 0; h < kSelections; ++h) sum += weights[h] = valid[h] ? expf(logits[h] - best) : 0.0f;
    sum = warp::reduce_add(sum);
#pragma unroll
    for (int h = 0; h < kSelections; ++h) weights[h] = valid[h] ? weights[h] / sum : 0.0f;
  } else {
#pragma unroll
    for (int h = 0; h < kSelections; ++h) {
      const float w =
          g.scoring == Scoring::kSigmoidTopk ? sigmoid(logits[h]) : score(g.scoring, logits[h], row);
      weights[h] = valid[h] ? w : 0.0f;
    }
  }
  if (g.renormalize) {
    float sum = 0.0f;
#pragma unroll
    for (int h = 0; h < kSelections; ++h) sum += weights[h];
    sum = warp::reduce_add(sum) + g.norm_eps;
    sum = sum < g.norm_min ? g.norm_min : sum;
#pragma unroll
    for (int h = 0; h < kSelections; ++h) weights[h] /= sum;
  }
#pragma unroll
  for (int h = 0; h < kSelections; ++h) {
    weights[h] *= g.scale;
    if (g.expert_scale != nullptr && valid[h]) weights[h] *= g.expert_scale[ids[h]];
  }
}

}  // namespace moekern::gating
