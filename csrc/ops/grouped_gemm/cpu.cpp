#include "common/dispatch.h"
#include "common/gemm_segments.h"
#include "common/gemm_sink.h"
#include "ops/grouped_gemm/params.h"

namespace moekern::MOEKERN_ISA {
namespace {

template <class T>
void run(const GroupedGemmParams& p) {
  using In = typename Layout<T>::Input;
  const auto* x = static_cast<const T*>(p.x);
  auto* out = static_cast<T*>(p.out);
  const int64_t width = num_columns(p.weight, p.activation);
  const int64_t first = std::clamp<int64_t>(p.offsets[0], 0, p.num_rows);
  const int64_t last = std::clamp<int64_t>(p.offsets[p.num_experts], first, p.num_rows);
  std::fill(out, out + first * width, T{});
  std::fill(out + last * width, out + p.num_rows * width, T{});
  const auto row = [&](int64_t i) -> const T* {
    const int64_t from = p.gather == nullptr ? i : p.gather[i];
    return from >= 0 && from < p.x_rows ? x + from * p.x_stride : nullptr;
  };
  static thread_local Scratch scratch;
  const int64_t kp = round_up(p.weight.k, kDepth);
  auto* packed = static_cast<In*>(scratch.get(max_slots(p.num_rows) * kp * sizeof(In)));
  const RowSink<T> sink{p.weight, p.activation, out, width, nullptr, p.row_scale};
  for_each_group<T>(p.offsets, p.num_experts, p.num_rows, p.weight.k,
                    [&](const Segment* segments, int count) {
                      pack_inputs<T>(segments, count, p.weight.k, row, packed);
                      GroupedGemm<T>{p.weight, p.activation, segments, count, packed}.run(sink);
                    });
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p) {
  dispatch(p.dtype, [&](auto type) { run<decltype(type)>(p); });
}

}  // namespace moekern::MOEKERN_ISA
