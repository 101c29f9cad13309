// What happens to a finished piece of a product: activation, rounding, and a place in the inputs of the next
// GEMM or in rows of the result. Pieces are z[group][token][weight row], or z[group][weight row][token] where
// inputs are panels.
#pragma once

#include "common/gemm_epilogue.h"
#include "common/gemm_pack.h"

namespace moekern::MOEKERN_ISA {

// The 16 (gated) or 32 columns of a block with their biases.
template <class T>
struct Columns {
  int first = 0;                           // output column of the first group
  int count[2] = {};                       // columns of each output group
  alignas(64) float bias[2 * kTile] = {};  // of each weight row group

  Columns(const Matrices& m, const Activation& a, int expert, int b) {
    RowGroup<T> g[2];
    int rows[2], step;
    groups_of(m, a, expert, b, g, rows, &step);
    for (int i = 0; i < 2; ++i) {
      load_bias<T>(m, expert, rows[i], step, g[i].rows, bias + i * kTile);
      count[i] = g[i].rows;
    }
    first = (a.gated ? 1 : 2) * kTile * b;
    if (a.gated) count[1] = 0;
  }
};

// Stores the first n lanes, rounded to T, as In.
template <class T, class In>
inline void store_rounded(In* to, VecF v, int n) {
  if constexpr (std::is_same_v<T, In>) {
    store_n(to, v, n);
  } else {
    T rounded[kLanes];
    store(rounded, v);
    store_n(to, load(rounded), n);
  }
}

// Output columns of one token: emit(column, values, how many of them).
template <class T, class Emit>
inline void finish_token(const Activation& a, const Columns<T>& c, const float* z0, const float* z1,
                         const Emit& emit) {
  for (int r = 0; r < kTile; r += kLanes) {
    const VecF v0 = load(z0 + r) + load(c.bias + r), v1 = load(z1 + r) + load(c.bias + kTile + r);
    if (a.gated) {
      if (r < c.count[0]) emit(c.first + r, activate_gated(a, v0, v1), c.count[0] - r);
    } else {
      if (r < c.count[0]) emit(c.first + r, activate_plain(a, v0), c.count[0] - r);
      if (r < c.count[1]) emit(c.first + kTile + r, activate_plain(a, v1), c.count[1] - r);
    }
  }
}

// Into the packed inputs of the next GEMM.
template <class T>
struct InputSink {
  using In = typename Layout<T>::Input;
  const Matrices& m;
  const Activation& act;
  In* out;

  int columns() const { return num_columns(m, act); }
  int64_t k_padded() const { return round_up(columns(), kDepth); }

  void rows(const Segment& s, int b, int t, int count, const float* z) const {
    const Columns<T> c(m, act, s.expert, b);
    for (int i = 0; i < count; ++i) {
      In* row = out + (s.slot + t + i) * k_padded();
      finish_token(act, c, z + i * kTile, z + kTile * kTile + i * kTile,
                   [&](int column, VecF v, int n) { store_rounded<T>(row + column, v, n); });
      if (c.first + c.count[0] + c.count[1] == columns()) std::fill(row + columns(), row + k_padded(), In{});
    }
  }

#if defined(__AVX512BF16__)
  void panel(const Segment& s, int b, int t, int, const float* z) const {
    const Columns<T> c(m, act, s.expert, b);
    auto* to = reinterpret_cast<uint32_t*>(out + (s.slot + t) * k_padded());
    const __mmask16 lanes = static_cast<__mmask16>((1u << s.width) - 1);
    const auto put = [&](int column, VecF even, VecF odd) {
      // Lane t: the even column in the low half, the odd one in the high half.
      const __m512i e = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
      const __m512i o = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
      _mm512_mask_storeu_epi32(to + column / 2 * s.width, lanes,
                               _mm512_or_si512(e, _mm512_slli_epi32(o, 16)));
    };
    const float* z1 = z + kTile * kTile;
    for (int r = 0; r < kTile; r += 2) {
      const auto row = [&](const float* p, const float* bias, int i) {
        return load(p + i * kTile) + splat(bias[i]);
      };
      const VecF a0 = row(z, c.bias, r), a1 = row(z, c.bias, r + 1);
      const VecF b0 = row(z1, c.bias + kTile, r), b1 = row(z1, c.bias + kTile, r + 1);
      if (act.gated) {
        put(c.first + r, activate_gated(act, a0, b0), activate_gated(act, a1, b1));
      } else {
        put(c.first + r, activate_plain(act, a0), activate_plain(act, a1));
        put(c.first + kTile + r, activate_plain(act, b0), activate_plain(act, b1));
      }
    }
    // Weight rows past the last are zeros and give zeros; a half step of K behind them is filled here.
    for (int column = c.first + kTile; act.gated && column < k_padded() && column >= columns(); column += 2) {
      put(column, zero(), zero());
    }
  }
#endif
};

// Into rows of the result; row i of the sorted order is row index[i], or i.
template <class T>
struct RowSink {
  const Matrices& m;
  const Activation& act;
  T* out;
  int64_t stride;
  const int32_t* index;
  const float* scale;  // by sorted row, or null

  void rows(const Segment& s, int b, int t, int count, const float* z) const {
    const Columns<T> c(m, act, s.expert, b);
    for (int i = 0; i < count; ++i) {
      const int64_t row = s.first + t + i;
      T* to = out + (index == nullptr ? row : index[row]) * stride;
      const VecF factor = splat(scale == nullptr ? 1.0f : scale[row]);
      finish_token(act, c, z + i * kTile, z + kTile * kTile + i * kTile,
                   [&](int column, VecF v, int n) { store_n(to + column, v * factor, n); });
    }
  }

#if defined(__AVX512BF16__)
  void panel(const Segment& s, int b, int t, int count, float* z) const {
    if (count <= 2) {
      alignas(64) float turned[4 * kTile];
      for (int g = 0; g < 2; ++g) {
        for (int i = 0; i < count; ++i) {
          for (int r = 0; r < kTile; ++r) turned[(2 * g + i) * kTile + r] = z[g * 256 + r * kTile + i];
        }
      }
      for (int g = 0; g < 2; ++g) {
        for (int i = 0; i < count * kTile; ++i) z[g * 256 + i] = turned[2 * g * kTile + i];
      }
    } else {
      for (int g = 0; g < 2; ++g) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(z + g * 256 + i * 16);
        transpose_16x16(v);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(z + g * 256 + i * 16, v[i]);
      }
    }
    rows(s, b, t, count, z);
  }
#endif
};

}  // namespace moekern::MOEKERN_ISA
