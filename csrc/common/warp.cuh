// What a warp does together. Kernels use these instead of intrinsics, so that the same source can run on a
// CPU with another implementation of this file. All 32 lanes take part in every call.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace moekern::warp {

constexpr int kSize = 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kSize; }
__device__ __forceinline__ unsigned ballot(bool v) { return __ballot_sync(kAll, v); }

// One instruction each since sm_80 (redux.sync), where a butterfly of shuffles takes ten.
__device__ __forceinline__ int reduce_max(int v) { return __reduce_max_sync(kAll, v); }
__device__ __forceinline__ int reduce_min(int v) { return __reduce_min_sync(kAll, v); }

template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(kAll, v, mask);
}

// The same value, bit for bit, in every lane: addition commutes, and a butterfly adds the same pairs
// everywhere.
__device__ __forceinline__ float reduce_add(float v) {
#pragma unroll
  for (int mask = kSize / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// A NaN loses against any number.
__device__ __forceinline__ float reduce_max(float v) {
#pragma unroll
  for (int mask = kSize / 2; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}

}  // namespace moekern::warp
