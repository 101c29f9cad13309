// bf16 products with vdpbf16ps, where there is no AMX.
//
// A sum runs along K, a pair at a time, in one lane of one register, in every function here: its bits do not
// depend on how many tokens are computed beside it.
#pragma once

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#include "common/gemm_prefetch.h"

namespace moekern::MOEKERN_ISA {

// Up to this many tokens the 16 lanes are weight rows, turned in registers (72 instructions a KiB of weights
// and 16 a token); with more, lanes are tokens and each pair of weights is broadcast (256 instructions a
// KiB).
constexpr int kFewTokens = 8;
constexpr int kPanelsAtOnce = 3;  // 8 weight rows x 3 panels: 24 sums, 11 loads for 24 products

inline __m512bh pair_of(const bfloat16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// 16 weight rows `row` elements apart, 32 values of each, times kTokens tokens of a panel x [16][kTokens][2].
template <int kTokens>
inline void turned_step(const bfloat16* w, int64_t row, const bfloat16* x, __m512 sum[kTokens]) {
  __m512i v[16];
  for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(w + r * row);
  transpose_16x16(v);
  for (int j = 0; j < 16; ++j) {
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)v[j], pair_of(x + 2 * (j * kTokens + t)));
    }
  }
}

// Where the weights lie that a thread reads next, asked for in the order of memory, `lines` cache lines with
// each step.
struct NextRows {
  const char* at = nullptr;
  int lines = 0;

  NextRows() = default;
  NextRows(const RowGroup<bfloat16>& g, int k, int steps) {
    // Rows with wide gaps between them are left to the hardware.
    if (g.depth != 1 || g.rows == 0 || g.row > 2 * k || steps == 0) return;
    at = reinterpret_cast<const char*>(g.w);
    lines = static_cast<int>((g.rows * g.row * 2 / 64 + steps - 1) / steps);
  }
};

// z[16 weight rows][16]: `steps` steps of the rows at w, then one of `tail` [16][32] when there is one. One
// group of rows after the other: 16 streams for the hardware's prefetcher, not 32.
template <int kTokens>
inline void turned_rows(const bfloat16* w, int64_t row, int steps, const bfloat16* tail, const bfloat16* x,
                        NextRows next, float* z) {
  __m512 sum[kTokens] = {};
  for (int s = 0; s < steps; ++s) {
    turned_step<kTokens>(w + s * kDepth, row, x, sum);
    for (int n = 0; n < next.lines; ++n) _mm_prefetch(next.at + 64 * n, _MM_HINT_T1);
    next.at += 64 * next.lines;
    x += kDepth * kTokens;
  }
  if (tail != nullptr) turned_step<kTokens>(tail, kDepth, x, sum);
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kTile; ++r) z[kTile * r + t] = sum[t][r];
  }
}

// z[16][16] in column 0 for one token, with lanes along K: 4 rows are 4 streams, and so few instructions a
// line that the processor looks far ahead: 43 GB/s where turned rows reach 38.
inline void dot_rows(const bfloat16* w, int64_t row, int steps, const bfloat16* tail, const bfloat16* x,
                     float* z) {
  constexpr int kRows = 4;
  for (int r = 0; r < kTile; r += kRows) {
    const bfloat16* from = w + r * row;
    __m512 sum[kRows] = {};
    for (int s = 0; s < steps; ++s) {
      const __m512bh xv = (__m512bh)_mm512_loadu_si512(x + s * kDepth);
      for (int i = 0; i < kRows; ++i) {
        const bfloat16* at = from + i * row + s * kDepth;
        _mm_prefetch(at + kRows * row, _MM_HINT_T1);
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(at), xv);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      if (tail != nullptr) {
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(tail + (r + i) * kDepth),
                                  (__m512bh)_mm512_loadu_si512(x + steps * kDepth));
      }
      z[kTile * (r + i)] = _mm512_reduce_add_ps(sum[i]);
    }
  }
}

using TurnedRows = void (*)(const bfloat16*, int64_t, int, const bfloat16*, const bfloat16*, NextRows,
                            float*);
// From two tokens on.
constexpr TurnedRows kTurnedRows[kFewTokens - 1] = {turned_rows<2>, turned_rows<3>, turned_rows<4>,
                                                    turned_rows<5>, turned_rows<6>, turned_rows<7>,
                                                    turned_rows<8>};

// Adds packed weights a [steps][32 rows][32] times kPanels panels of tokens to z[panel][32 rows][16]; sets z
// when `first`. Lanes past `width` tokens (of a single panel) are zeros.
template <int kRows, int kPanels>
inline void accumulate_panels(const bfloat16* a, const bfloat16* x, int64_t panel_stride, int width,
                              int steps, bool first, Prefetcher& ahead, float* z) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << width) - 1);
  for (int r0 = 0; r0 < 2 * kTile; r0 += kRows) {
    __m512 sum[kRows][kPanels];
    for (int p = 0; p < kPanels; ++p) {
      for (int r = 0; r < kRows; ++r) {
        sum[r][p] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(z + 512 * p + kTile * (r0 + r));
      }
    }
    for (int s = 0; s < steps; ++s) {
      const bfloat16* w = a + (s * 2 * kTile + r0) * kDepth;
      const bfloat16* from = x + s * kDepth * width;
      for (int j = 0; j < kDepth; j += 2) {
        __m512bh xv[kPanels];
        for (int p = 0; p < kPanels; ++p) {
          const bfloat16* at = from + p * panel_stride + j * width;
          xv[p] = (__m512bh)(kPanels == 1 ? _mm512_maskz_loadu_epi32(lanes, at) : _mm512_loadu_si512(at));
        }
        for (int r = 0; r < kRows; ++r) {
          const __m512bh wv = pair_of(w + r * kDepth + j);
          for (int p = 0; p < kPanels; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], wv, xv[p]);
        }
      }
      ahead.step();
    }
    for (int p = 0; p < kPanels; ++p) {
      for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(z + 512 * p + kTile * (r0 + r), sum[r][p]);
    }
  }
}

// How often accumulate_panels calls ahead.step() for a step of K, by the number of panels.
constexpr int kRowsAtOnce[kPanelsAtOnce] = {16, 8, 8};

}  // namespace moekern::MOEKERN_ISA

#endif
