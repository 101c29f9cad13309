// gate_topk: one warp per token, its row in registers, K rounds of two warp-wide reductions.
#include "common/cuda_check.cuh"
#include "common/dispatch.h"
#include "ops/gate_topk/select.cuh"

namespace moekern {
namespace {

constexpr int kMaxWarps = 4;

template <class Id>
__device__ __forceinline__ void store_id(const GateTopkParams& p, int64_t at, Id id) {
  if (p.int64_ids) {
    static_cast<int64_t*>(p.ids)[at] = id;
  } else {
    static_cast<int32_t*>(p.ids)[at] = static_cast<int32_t>(id);
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(kMaxWarps* warp::kSize) gate_topk_kernel(const GateTopkParams p) {
  using namespace gating;
  const GatingParams& g = p.gating;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / warp::kSize) + threadIdx.x / warp::kSize;
  if (t >= p.num_tokens) return;  // a whole warp
  const T* row = static_cast<const T*>(p.logits) + t * p.logits_stride;
  const int lane = warp::lane();

  float x[kItems];
  Softmax softmax;
  if (g.scoring == Scoring::kSoftmax || p.preselected == nullptr) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = i * warp::kSize + lane;
      x[i] = e < g.num_experts ? to_float(row[e]) : -INFINITY;
    }
    if (g.scoring == Scoring::kSoftmax) softmax = softmax_of(x);
  }

  int ids[kSelections] = {};
  bool valid[kSelections];
  if (p.preselected == nullptr) {
    int key[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = i * warp::kSize + lane;
      const bool real = e < g.num_experts;
      const float bias = g.bias != nullptr && real ? g.bias[e] : 0.0f;
      key[i] = real ? ordered_key(score(g.scoring, x[i], softmax) + bias) : kTaken;
    }
    if (g.num_groups > 1) keep_best_groups(g, key);
    select(g, key, ids);
  }
#pragma unroll
  for (int h = 0; h < kSelections; ++h) {
    const int k = h * warp::kSize + lane;
    const int64_t at = t * g.top_k + k;
    valid[h] = k < g.top_k;
    if (!valid[h]) continue;
    if (p.preselected == nullptr) {
      store_id(p, at, ids[h]);
      continue;
    }
    const int64_t id = p.int64_ids ? static_cast<const int64_t*>(p.preselected)[at]
                                   : static_cast<const int32_t*>(p.preselected)[at];
    store_id(p, at, id);
    valid[h] = id >= 0 && id < g.num_experts;
    ids[h] = valid[h] ? static_cast<int>(id) : 0;
  }

  // The selected logits once more, from the cache: a score carried through each round would be another
  // reduction in it, and the key holds score + bias, which has lost digits.
  float logits[kSelections], weights[kSelections];
#pragma unroll
  for (int h = 0; h < kSelections; ++h) logits[h] = valid[h] ? to_float(row[ids[h]]) : 0.0f;
  weigh(g, softmax, ids, valid, logits, weights);
#pragma unroll
  for (int h = 0; h < kSelections; ++h) {
    const int k = h * warp::kSize + lane;
    if (k < g.top_k) p.weights[t * g.top_k + k] = weights[h];
  }
}

template <class T>
void launch(const GateTopkParams& p, cudaStream_t stream) {
  // Few tokens: one warp a block, so that every token has an SM; many: four, or the limit of blocks an SM
  // leaves it half empty.
  const int warps = p.num_tokens < 1024 ? 1 : kMaxWarps;
  const auto blocks = static_cast<unsigned>((p.num_tokens + warps - 1) / warps);
  const dim3 threads(warps * warp::kSize);
  const int items = (p.gating.num_experts + warp::kSize - 1) / warp::kSize;
  if (items <= 1) {
    gate_topk_kernel<T, 1><<<blocks, threads, 0, stream>>>(p);
  } else if (items <= 2) {
    gate_topk_kernel<T, 2><<<blocks, threads, 0, stream>>>(p);
  } else if (items <= 4) {
    gate_topk_kernel<T, 4><<<blocks, threads, 0, stream>>>(p);
  } else if (items <= 8) {
    gate_topk_kernel<T, 8><<<blocks, threads, 0, stream>>>(p);
  } else if (items <= 16) {
    gate_topk_kernel<T, 16><<<blocks, threads, 0, stream>>>(p);
  } else {
    gate_topk_kernel<T, 32><<<blocks, threads, 0, stream>>>(p);
  }
  MOEKERN_CUDA_CHECK_LAUNCH(gate_topk_kernel);
}

}  // namespace

void gate_topk_cuda(const GateTopkParams& p, const CudaTarget& target) {
  if (p.num_tokens == 0) return;
  if (p.gating.num_experts > kMaxCudaExperts) {
    throw std::runtime_error("gate_topk: the CUDA kernel takes at most 1024 experts");
  }
  dispatch(p.dtype, [&](auto type) { launch<decltype(type)>(p, static_cast<cudaStream_t>(target.stream)); });
}

}  // namespace moekern
