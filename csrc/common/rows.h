// Products of a few fp32 rows with many rows of a stored dtype: what attention over a cache and the products
// with a weight that is used by one or a few tokens consist of. Bound by memory, so B is read once, in order.
#pragma once

#include "common/simd.h"

namespace moekern::MOEKERN_ISA {

// C[m][j] = sum over k of A[m][k] B[j][k] for MB rows of A and NB rows of B.
template <int MB, int NB, class T>
inline void dot_block(const float* a, int64_t lda, const T* const* b, int64_t width, float* c, int64_t ldc,
                      int n) {
  VecF acc[MB][NB];
  for (int m = 0; m < MB; ++m)
    for (int j = 0; j < NB; ++j) acc[m][j] = zero();
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    VecF row[NB];
    for (int j = 0; j < NB; ++j) row[j] = load(b[j] + k);
    for (int m = 0; m < MB; ++m) {
      const VecF left = load(a + m * lda + k);
      for (int j = 0; j < NB; ++j) acc[m][j] = fma(left, row[j], acc[m][j]);
    }
  }
  if (k < width) {
    const int rest = static_cast<int>(width - k);
    for (int m = 0; m < MB; ++m) {
      const VecF left = load_n(a + m * lda + k, rest);
      for (int j = 0; j < NB; ++j) acc[m][j] = fma(left, load_n(b[j] + k, rest), acc[m][j]);
    }
  }
  for (int m = 0; m < MB; ++m)
    for (int j = 0; j < NB && j < n; ++j) c[m * ldc + j] += reduce_add(acc[m][j]);
}

// C[m][j] += sum over k of A[m][k] B[j][k]; row(j) is the address of B's row j.
template <class T, class Row>
inline void dot_rows(const float* a, int64_t lda, int64_t rows, Row row, int64_t count, int64_t width,
                     float* c, int64_t ldc) {
  constexpr int kWide = 8;                     // one row of A: 8 chains hide the latency of fma
  constexpr int kTall = kLanes == 16 ? 4 : 2;  // four rows of A: 16 (8) accumulators of 32 (16) registers
  const auto pointers = [&](const T** b, int64_t j, int n) {
    for (int i = 0; i < n; ++i)
      b[i] = row(j + i < count ? j + i : count - 1);  // the last row again past the end
  };
  const int64_t tall = rows / 4 * 4;
  const T* b[kWide];
  for (int64_t j = 0; j < count && tall > 0; j += kTall) {
    pointers(b, j, kTall);
    for (int64_t m = 0; m < tall; m += 4) {
      dot_block<4, kTall, T>(a + m * lda, lda, b, width, c + m * ldc + j, ldc, static_cast<int>(count - j));
    }
  }
  for (int64_t j = 0; j < count && tall < rows; j += kWide) {
    pointers(b, j, kWide);
    for (int64_t m = tall; m < rows; ++m) {
      dot_block<1, kWide, T>(a + m * lda, lda, b, width, c + m * ldc + j, ldc, static_cast<int>(count - j));
    }
  }
}

// C[m][k] += sum over j of A[m][j] B[j][k]; row(j) is the address of B's row j.
template <class T, class Row>
inline void add_rows(const float* a, int64_t lda, int64_t rows, Row row, int64_t count, int64_t width,
                     float* c, int64_t ldc) {
  constexpr int kDepth = 8;  // rows of B added per load and store of C
  for (int64_t j = 0; j < count; j += kDepth) {
    const int n = static_cast<int>(count - j < kDepth ? count - j : kDepth);
    const T* b[kDepth];
    for (int i = 0; i < n; ++i) b[i] = row(j + i);
    const auto step = [&](int64_t k, int lanes) {
      VecF right[kDepth];
      for (int i = 0; i < n; ++i) right[i] = load_n(b[i] + k, lanes);
      for (int64_t m = 0; m < rows; ++m) {
        const float* left = a + m * lda + j;
        VecF sum = load_n(c + m * ldc + k, lanes);
        for (int i = 0; i < n; ++i) sum = fma(splat(left[i]), right[i], sum);
        store_n(c + m * ldc + k, sum, lanes);
      }
    };
    int64_t k = 0;
    if (n == kDepth) {
      for (; k + kLanes <= width; k += kLanes) {
        VecF right[kDepth];
        for (int i = 0; i < kDepth; ++i) right[i] = load(b[i] + k);
        for (int64_t m = 0; m < rows; ++m) {
          const float* left = a + m * lda + j;
          VecF sum = load(c + m * ldc + k);
          for (int i = 0; i < kDepth; ++i) sum = fma(splat(left[i]), right[i], sum);
          store(c + m * ldc + k, sum);
        }
      }
    }
    for (; k < width; k += kLanes) step(k, static_cast<int>(width - k < kLanes ? width - k : kLanes));
  }
}

}  // namespace moekern::MOEKERN_ISA
