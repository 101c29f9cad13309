// Vectors of fp32 in the width of the instruction set a file is compiled for (GCC and Clang vector
// extensions), with converting loads and stores for bf16 and fp16. kLanes: 16 with AVX-512, 8 with AVX2, 4
// otherwise.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef MOEKERN_ISA
#error "compile CPU kernels through moekern_cpu_kernels() in CMakeLists.txt, which defines MOEKERN_ISA"
#endif

namespace moekern::MOEKERN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));

inline VecF splat(float v) { return v - VecF{}; }
inline VecI splat_i(int32_t v) { return v - VecI{}; }
inline VecF zero() { return VecF{}; }

// mask ? a : b, mask lanes all ones or all zeros (what a comparison of vectors gives).
inline VecF blend(VecI mask, VecF a, VecF b) { return mask ? a : b; }
inline VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
inline VecF vmin(VecF a, VecF b) { return a < b ? a : b; }

inline VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline float reduce_add(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline float reduce_max(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = best > v[i] ? best : v[i];
  return best;
#endif
}

// ---- loads: kLanes elements, or the first n of them with zeros behind; nothing past them is read ----

inline VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline VecF load(const bfloat16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline VecF load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

template <class T>
inline VecF load_n(const T* p, int n) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

// ---- stores: rounded to nearest even ----

inline void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }

inline void store(bfloat16* p, VecF v) {
#if defined(__AVX512BF16__)
  // Flushes subnormals to zero, as AMX and vdpbf16ps do with their inputs.
  const __m256bh h = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &h, sizeof h);
#elif defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<bfloat16>(v[i]);
#endif
}

inline void store(float16* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<float16>(v[i]);
#endif
}

template <class T>
inline void store_n(T* p, VecF v, int n) {
  if (n >= kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// e^x, within 2 ulp over the normal range; 0 below -103.97, inf above 88.72, NaN for NaN.
inline VecF exp(VecF x) {
  const VecF lo = splat(-104.0f), hi = splat(89.0f);
  // Written so that a NaN falls through to the polynomial.
  const VecF c = x < lo ? lo : (x > hi ? hi : x);
  const VecF shift = splat(0x1.8p23f);
  const VecF t = fma(c, splat(0x1.715476p+0f), shift);
  const VecF n = t - shift;
  VecF r = fma(n, splat(-0x1.62e4p-1f), c);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  VecF y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y * r, r, r) + splat(1.0f);
  // 2^n in two factors, so that neither overflows nor underflows on its own.
  const VecI i = (VecI)t - (VecI)shift;
  const VecI half = i >> 1;
  const VecF a = (VecF)((half + splat_i(127)) << 23);
  const VecF b = (VecF)((i - half + splat_i(127)) << 23);
  return y * a * b;
}

}  // namespace moekern::MOEKERN_ISA
