#include "common/dispatch.h"
#include "common/gemm_segments.h"
#include "common/gemm_sink.h"
#include "ops/combine/sum.h"
#include "ops/fused_experts/params.h"
#include "ops/route/sort.h"

namespace moekern::MOEKERN_ISA {
namespace {

// Scratch of one call, carved out of one allocation.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(int64_t count) {
    U* p = reinterpret_cast<U*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class In>
struct Workspace {
  int32_t *perm, *offsets, *counts;
  In *x, *h;

  int64_t carve(void* base, int64_t pairs, int num_experts, int d, int f) {
    Carver c(base);
    perm = c.take<int32_t>(pairs);
    offsets = c.take<int32_t>(num_experts + 1);
    counts = c.take<int32_t>(num_experts);
    x = c.take<In>(max_slots(pairs) * round_up(d, kDepth));
    h = c.take<In>(max_slots(pairs) * round_up(f, kDepth));
    return c.used();
  }
};

template <class T, class Id>
void run(const FusedExpertsParams& p) {
  using In = typename Layout<T>::Input;
  const auto* x = static_cast<const T*>(p.x);
  const auto* ids = static_cast<const Id*>(p.ids);
  auto* rows = static_cast<T*>(p.rows);
  const int d = p.up.k, f = p.down.k;
  const int64_t pairs = p.num_tokens * p.top_k;
  static thread_local Scratch scratch;
  Workspace<In> w;
  w.carve(scratch.get(w.carve(nullptr, pairs, p.num_experts, d, f)), pairs, p.num_experts, d, f);

  sort_pairs(ids, pairs, p.num_experts, w.perm, w.offsets, w.counts);
  const auto row = [&](int64_t i) { return x + w.perm[i] / p.top_k * p.x_stride; };
  const Activation none;
  const InputSink<T> to_h{p.up, p.activation, w.h};
  const RowSink<T> to_rows{p.down, none, rows, d, w.perm, nullptr};
  for_each_group<T>(w.offsets, p.num_experts, pairs, std::max(d, f), [&](const Segment* segments, int count) {
    pack_inputs<T>(segments, count, d, row, w.x);
    GroupedGemm<T>{p.up, p.activation, segments, count, w.x}.run(to_h);
    GroupedGemm<T>{p.down, none, segments, count, w.h}.run(to_rows);
  });

  if (p.out != nullptr) {
    CombineParams c{};
    c.y = rows;
    c.weights = p.weights;
    c.ids = p.ids;
    c.out = p.out;
    c.int64_ids = p.int64_ids;
    c.num_tokens = p.num_tokens;
    c.y_stride = d;
    c.top_k = p.top_k;
    c.width = d;
    c.num_experts = p.num_experts;
    return sum_pairs<T>(c);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    if (ids[i] < 0 || ids[i] >= p.num_experts) std::fill(rows + i * d, rows + (i + 1) * d, T{});
  }
}

}  // namespace

void fused_experts(const FusedExpertsParams& p) {
  dispatch(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.int64_ids ? run<T, int64_t>(p) : run<T, int32_t>(p);
  });
}

}  // namespace moekern::MOEKERN_ISA
