// Dot products of a few weight rows with a few input rows, along K: every instruction set and type but bf16
// on AMX.
//
// Both operands are read in their row-major layout, so one token needs no padding; a sum is kept in one
// vector per (weight row, token), added up at the end, so that the bits of a result do not depend on what is
// computed beside it.
#pragma once

#include "common/gemm_pack.h"

namespace moekern::MOEKERN_ISA {

// Weight rows x tokens in registers: 4 x 4 of AVX-512's 32 registers, 2 x 4 of 16.
#if defined(__AVX512F__)
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 2;
#endif
constexpr int kDotTokens = 4;

// z[t * z_stride + r] = sum over k of w[r * w_stride + k] * x[t * x_stride + k]; x is padded with zeros, w is
// not.
template <int kRows, int kTokens, class T>
inline void dot_tile(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int k, int64_t ahead,
                     float* z, int64_t z_stride) {
  VecF sum[kRows][kTokens] = {};
  int i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    VecF wv[kRows];
    for (int r = 0; r < kRows; ++r) {
      wv[r] = load(w + r * w_stride + i);
      if (kTokens == 1 && ahead != 0 && i % (64 / sizeof(T)) == 0) {
        __builtin_prefetch(w + r * w_stride + ahead + i, 0, 2);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      const VecF xv = load(x + t * x_stride + i);
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(wv[r], xv, sum[r][t]);
    }
  }
  if (i < k) {
    for (int r = 0; r < kRows; ++r) {
      const VecF wv = load_n(w + r * w_stride + i, k - i);
      for (int t = 0; t < kTokens; ++t) sum[r][t] = fma(wv, load(x + t * x_stride + i), sum[r][t]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) z[t * z_stride + r] = reduce_add(sum[r][t]);
  }
}

#if defined(__AVX512BF16__)
template <int kRows, int kTokens>
inline void dot_tile(const bfloat16* w, int64_t w_stride, const bfloat16* x, int64_t x_stride, int k,
                     int64_t ahead, float* z, int64_t z_stride) {
  __m512 sum[kRows][kTokens] = {};
  for (int i = 0; i < k; i += 32) {
    const __mmask32 valid = k - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (k - i)) - 1;
    __m512bh wv[kRows];
    for (int r = 0; r < kRows; ++r) {
      wv[r] = (__m512bh)_mm512_maskz_loadu_epi16(valid, w + r * w_stride + i);
      if (kTokens == 1 && ahead != 0) __builtin_prefetch(w + r * w_stride + ahead + i, 0, 2);
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512bh xv = (__m512bh)_mm512_loadu_si512(x + t * x_stride + i);
      for (int r = 0; r < kRows; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], wv[r], xv);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) z[t * z_stride + r] = reduce_add(sum[r][t]);
  }
}
#endif

template <int kRows, class T, class In>
inline void dot_rows(const T* w, int64_t w_stride, const In* x, int64_t x_stride, int tokens, int k,
                     int64_t ahead, float* z, int64_t z_stride) {
  int t = 0;
  for (; t + kDotTokens <= tokens; t += kDotTokens) {
    dot_tile<kRows, kDotTokens>(w, w_stride, x + t * x_stride, x_stride, k, ahead, z + t * z_stride,
                                z_stride);
  }
  for (; t < tokens; ++t) {
    dot_tile<kRows, 1>(w, w_stride, x + t * x_stride, x_stride, k, ahead, z + t * z_stride, z_stride);
  }
}

// z[t][r] for `rows` weight rows and `tokens` input rows. `ahead`: how far behind each row, in elements, the
// weights lie that are wanted next; 0 for none.
template <class T, class In>
inline void dot_block(const T* w, int64_t w_stride, int rows, const In* x, int64_t x_stride, int tokens,
                      int k, int64_t ahead, float* z, int64_t z_stride) {
  int r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) {
    dot_rows<kDotRows>(w + r * w_stride, w_stride, x, x_stride, tokens, k, ahead, z + r, z_stride);
  }
  for (; r < rows; ++r) {
    dot_rows<1>(w + r * w_stride, w_stride, x, x_stride, tokens, k, ahead, z + r, z_stride);
  }
}

}  // namespace moekern::MOEKERN_ISA
