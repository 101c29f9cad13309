// Layouts of the grouped GEMM's operands.
//
// kPanels (bf16 with AMX or vdpbf16ps): inputs in panels of up to 16 tokens, [K/2][width][2], which is what a
// B tile is loaded from, and a vector of 16 tokens. A row slot is one token of a panel. Otherwise: row-major
// inputs [rows][K] in fp32. K is padded with zeros to a multiple of 32 in both.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/gemm.h"
#include "common/transpose.h"

namespace moekern::MOEKERN_ISA {

constexpr int kTile = 16;   // weight rows, and tokens, of a block of a product
constexpr int kDepth = 32;  // K is processed in steps of this

template <class T>
struct Layout {
  static constexpr bool kPanels = false;
  using Input = float;
};

#if defined(__AVX512BF16__)
template <>
struct Layout<bfloat16> {
  static constexpr bool kPanels = true;
  using Input = bfloat16;
};
#endif

inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// 16 weight rows that make one tile: element (r, k) at w[r * row + k * depth].
template <class T>
struct RowGroup {
  const T* w;
  int64_t row;
  int64_t depth;
  int rows;
};

// The two groups of block b: gate and up rows of 16 output columns, or two runs of 16 columns when not gated.
template <class T>
inline void groups_of(const Matrices& m, const Activation& a, int expert, int b, RowGroup<T> out[2],
                      int first[2], int* step) {
  const T* base = static_cast<const T*>(m.data) + expert * m.expert_stride;
  const int half = m.n / 2;
  *step = a.gated && a.interleaved ? 2 : 1;
  for (int g = 0; g < 2; ++g) {
    int rows;
    if (!a.gated) {
      first[g] = 2 * kTile * b + kTile * g;
      rows = m.n - first[g];
    } else {
      first[g] = a.interleaved ? 2 * kTile * b + g : kTile * b + half * g;
      rows = half - kTile * b;
    }
    rows = std::clamp(rows, 0, kTile);
    const int64_t n_stride = m.transposed ? 1 : m.row_stride, k_stride = m.transposed ? m.row_stride : 1;
    // A group without rows is never read; its pointer stays inside the tensor.
    out[g] = {base + (rows > 0 ? first[g] * n_stride : 0), *step * n_stride, k_stride, rows};
  }
}

inline int num_blocks(const Matrices& m, const Activation& a) {
  const int columns = a.gated ? m.n / 2 : m.n, per_block = a.gated ? kTile : 2 * kTile;
  return (columns + per_block - 1) / per_block;
}

inline int num_columns(const Matrices& m, const Activation& a) { return a.gated ? m.n / 2 : m.n; }

// Bias of the 16 rows of a group, zeros where there is none.
template <class T>
inline void load_bias(const Matrices& m, int expert, int first, int step, int rows, float* out) {
  std::fill(out, out + kTile, 0.0f);
  if (m.bias == nullptr) return;
  const T* bias = static_cast<const T*>(m.bias) + expert * m.bias_stride + first;
  for (int r = 0; r < rows; ++r) out[r] = to_float(bias[r * step]);
}

#if defined(__AVX512F__)

// 16 rows of up to 16 fp32 weights that lie in 16 rows of [K, N], 1 or 2 apart (plain or interleaved).
inline void turn16(const float* w, int64_t row, int64_t depth, float* out, int64_t width) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i v[16];
  for (int i = 0; i < 16; ++i) {
    const float* from = w + i * depth;
    _mm_prefetch(from + 32 * depth, _MM_HINT_T0);
    v[i] = _mm512_loadu_si512(from);
    // The 16th of the second half is the next pair's.
    if (row == 2) v[i] = _mm512_permutex2var_epi32(v[i], even, _mm512_maskz_loadu_epi32(0x7fff, from + 16));
  }
  transpose_16x16(v);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * width, v[i]);
}

#endif

// Copies a group to [16][depth_padded], rows and depth padded with zeros, `width` elements apart.
template <class T>
inline void pack_group(const RowGroup<T>& g, int k0, int depth, int depth_padded, T* out, int64_t width) {
  const T none{};
  if (g.depth == 1) {
    for (int r = 0; r < kTile; ++r) {
      T* to = out + r * width;
      int k = 0;
      if (r < g.rows) {
        const T* from = g.w + r * g.row + k0;
        if (depth == kDepth) {
          __builtin_memcpy(to, from, kDepth * sizeof(T));  // a known size: vector moves, no call
        } else {
          __builtin_memcpy(to, from, depth * sizeof(T));
        }
        k = depth;
      }
      for (; k < depth_padded; ++k) to[k] = none;
    }
    return;
  }
  int k = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    for (; g.rows == kTile && g.row <= 2 && k + kTile <= depth; k += kTile) {
      turn16(g.w + (k0 + k) * g.depth, g.row, g.depth, out + k, width);
    }
  }
#endif
  for (; k < depth; ++k) {
    const T* from = g.w + (k0 + k) * g.depth;
    for (int r = 0; r < kTile; ++r) out[r * width + k] = r < g.rows ? from[r * g.row] : none;
  }
  for (int r = 0; r < kTile; ++r) {
    for (int i = depth; i < depth_padded; ++i) out[r * width + i] = none;
  }
}

// One input row into the row-major layout.
template <class T, class In>
inline void pack_row(const T* from, int k, int k_padded, In* to) {
  if constexpr (std::is_same_v<T, In>) {
    __builtin_memcpy(to, from, k * sizeof(T));
    std::fill(to + k, to + k_padded, In{});
  } else {
    for (int i = 0; i < k_padded; i += kLanes) store(to + i, i < k ? load_n(from + i, k - i) : zero());
  }
}

#if defined(__AVX512BF16__)

// A panel from `width` rows; rows from `count` on are zeros (null: a row of zeros too).
inline void pack_panel(const bfloat16* const* rows, int count, int width, int k, bfloat16* out) {
  auto* to = reinterpret_cast<uint32_t*>(out);
  const int k_padded = static_cast<int>(round_up(k, kDepth));
  if (width == 1) {  // one token: a panel is the row itself
    if (count > 0 && rows[0] != nullptr) return pack_row(rows[0], k, k_padded, out);
    return std::fill(out, out + k_padded, bfloat16{});
  }
  const __mmask16 lanes = static_cast<__mmask16>((1u << width) - 1);
  for (int k0 = 0; k0 < k_padded; k0 += kDepth) {
    const int depth = std::min(kDepth, k - k0);
    const __mmask32 valid = depth == kDepth ? ~__mmask32{0} : (__mmask32{1} << depth) - 1;
    __m512i v[16];
    for (int t = 0; t < 16; ++t) {
      const bfloat16* row = t < count ? rows[t] : nullptr;
      v[t] = row == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, row + k0);
    }
    transpose_16x16(v);
    for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(to + (k0 / 2 + i) * width, lanes, v[i]);
  }
}

constexpr int kTransposedAhead = 64;  // rows of [K, N]

// Both groups of a block whose weights are transposed, one A tile each, from 32 rows of [K, N].
inline void pack_transposed(const RowGroup<bfloat16> g[2], int k0, bool interleaved, bfloat16* out0,
                            bfloat16* out1) {
  __m512i a[16], b[16];
  const __m512i low = _mm512_set1_epi32(0xffff);
  for (int i = 0; i < 16; ++i) {
    const bfloat16* even = g[0].w + (k0 + 2 * i) * g[0].depth;
    // Short pieces of rows far apart: no hardware prefetcher follows them.
    for (int j = 0; j < 2; ++j) {
      _mm_prefetch(even + (kTransposedAhead + j) * g[0].depth, _MM_HINT_T0);
      if (!interleaved) {
        _mm_prefetch(g[1].w + (k0 + 2 * i + kTransposedAhead + j) * g[1].depth, _MM_HINT_T0);
      }
    }
    if (interleaved) {  // 32 bits hold gate and up
      const __m512i p = _mm512_loadu_si512(even), q = _mm512_loadu_si512(even + g[0].depth);
      a[i] = _mm512_or_si512(_mm512_and_si512(p, low), _mm512_slli_epi32(q, 16));
      b[i] = _mm512_or_si512(_mm512_srli_epi32(p, 16), _mm512_andnot_si512(low, q));
    } else {
      const bfloat16* other = g[1].w + (k0 + 2 * i) * g[1].depth;
      const auto half = [](const bfloat16* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      };
      a[i] = _mm512_or_si512(half(even), _mm512_slli_epi32(half(even + g[0].depth), 16));
      b[i] = _mm512_or_si512(half(other), _mm512_slli_epi32(half(other + g[1].depth), 16));
    }
  }
  transpose_16x16(a);
  transpose_16x16(b);
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(out0 + i * kDepth, a[i]);
    _mm512_storeu_si512(out1 + i * kDepth, b[i]);
  }
}

#endif

}  // namespace moekern::MOEKERN_ISA
