#include <memory>

#include "common/dispatch.h"
#include "common/gemm_dot.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "ops/gate/params.h"
#include "ops/gate_topk/select.h"

namespace moekern::MOEKERN_ISA {
namespace {

// Tokens that a thread takes through the GEMM together: each weight row is read once for all of them.
constexpr int kTokens = 16;

// Logits of `count` tokens, fp32: out[t * E + e].
template <class X, class W>
void project(const GateParams& p, int64_t first, int count, int e0, int e1, float* x32, float* out) {
  const int64_t dp = round_up(p.width, kDepth);
  const auto* x = static_cast<const X*>(p.x);
  const auto* w = static_cast<const W*>(p.weight);
  for (int t = 0; t < count; ++t)
    pack_row(x + (first + t) * p.x_stride, p.width, static_cast<int>(dp), x32 + t * dp);
  dot_block(w + e0 * p.weight_stride, p.weight_stride, e1 - e0, x32, dp, count, p.width,
            kDotRows * p.weight_stride, out + e0, p.gating.num_experts);
}

template <class Id, class Logit>
void finish(const GateParams& p, int64_t t, const float* row, GatingScratch& scratch) {
  const GatingParams& g = p.gating;
  auto* logits = static_cast<Logit*>(p.logits) + t * g.num_experts;
  for (int i = 0; i < g.num_experts; i += kLanes) {
    const int n = g.num_experts - i;
    VecF v = load_n(row + i, n);
    if (p.linear_bias != nullptr) v += load_n(p.linear_bias + i, n);
    store_n(logits + i, v, n);
    store_n(scratch.logits + i, load_n(logits + i, n), n);  // the gating sees the rounded logits
  }
  const auto* given = static_cast<const Id*>(p.preselected);
  const int64_t at = t * g.top_k;
  gate_token(g, scratch, given == nullptr ? nullptr : given + at, p.weights + at,
             static_cast<Id*>(p.ids) + at);
}

template <class X, class W>
void run(const GateParams& p) {
  const int experts = p.gating.num_experts;
  const int64_t dp = round_up(p.width, kDepth);
  const auto select = [&](int64_t t, const float* row, GatingScratch& scratch) {
    dispatch(p.logits_dtype, [&](auto type) {
      using L = decltype(type);
      p.int64_ids ? finish<int64_t, L>(p, t, row, scratch) : finish<int32_t, L>(p, t, row, scratch);
    });
  };
  if (p.num_tokens < kTokens * 2) {
    // Few tokens: the threads share the experts, and one of them selects.
    static thread_local Scratch results;
    auto* z = static_cast<float*>(results.get(p.num_tokens * experts * sizeof(float)));
    const int64_t grain = std::max<int64_t>(kDotRows, (int64_t{1} << 16) / (dp * p.num_tokens + 1));
    parallel_for(experts, grain, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      auto* x32 = static_cast<float*>(scratch.get(kTokens * dp * sizeof(float)));
      for (int64_t t = 0; t < p.num_tokens; t += kTokens) {
        const int count = static_cast<int>(std::min<int64_t>(kTokens, p.num_tokens - t));
        project<X, W>(p, t, count, static_cast<int>(begin), static_cast<int>(end), x32, z + t * experts);
      }
    });
    const auto scratch = std::make_unique<GatingScratch>();
    for (int64_t t = 0; t < p.num_tokens; ++t) select(t, z + t * experts, *scratch);
    return;
  }
  parallel_for((p.num_tokens + kTokens - 1) / kTokens, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    auto* x32 = static_cast<float*>(scratch.get(kTokens * (dp + experts) * sizeof(float)));
    float* z = x32 + kTokens * dp;
    const auto gating = std::make_unique<GatingScratch>();
    for (int64_t t = begin * kTokens; t < std::min(end * kTokens, p.num_tokens); t += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, p.num_tokens - t));
      project<X, W>(p, t, count, 0, experts, x32, z);
      for (int i = 0; i < count; ++i) select(t + i, z + i * experts, *gating);
    }
  });
}

}  // namespace

void gate(const GateParams& p) {
  dispatch(p.x_dtype,
           [&](auto x) { dispatch(p.weight_dtype, [&](auto w) { run<decltype(x), decltype(w)>(p); }); });
}

}  // namespace moekern::MOEKERN_ISA
