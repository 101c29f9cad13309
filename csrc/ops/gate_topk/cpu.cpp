#include <memory>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "ops/gate_topk/select.h"

namespace moekern::MOEKERN_ISA {
namespace {

template <class T, class Id>
void run(const GateTopkParams& p) {
  const GatingParams& g = p.gating;
  const auto* logits = static_cast<const T*>(p.logits);
  const auto* given = static_cast<const Id*>(p.preselected);
  auto* ids = static_cast<Id*>(p.ids);
  // About 10 ns an expert and token: 64 tokens of 64 experts make a range worth a thread.
  const int64_t grain = 1 + 4096 / g.num_experts;
  parallel_for(p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique<GatingScratch>();
    for (int64_t t = begin; t < end; ++t) {
      const T* row = logits + t * p.logits_stride;
      for (int i = 0; i < g.num_experts; i += kLanes) {
        store_n(scratch->logits + i, load_n(row + i, g.num_experts - i), g.num_experts - i);
      }
      const int64_t at = t * g.top_k;
      gate_token(g, *scratch, given == nullptr ? nullptr : given + at, p.weights + at, ids + at);
    }
  });
}

}  // namespace

void gate_topk(const GateTopkParams& p) {
  dispatch(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.int64_ids ? run<T, int64_t>(p) : run<T, int32_t>(p);
  });
}

}  // namespace moekern::MOEKERN_ISA
