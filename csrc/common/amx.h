// AMX tiles: eight registers of 16 rows of 64 bytes. A tile of A holds 16 rows of 32 bf16; a tile of B holds
// 16 pairs of k, each with 16 columns of two bf16 (k, k + 1); C holds 16 x 16 fp32.
#pragma once

#include "common/simd.h"

namespace moekern::MOEKERN_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHaveAmx = true;
#else
constexpr bool kHaveAmx = false;
#endif

// The tiles of this thread are configured while an AmxScope<true> lives.
template <bool kEnabled>
struct AmxScope {};

#if defined(__AMX_BF16__)

template <>
struct AmxScope<true> {
  AmxScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    asm volatile("" ::"m"(config) : "memory");  // the intrinsic names only the first 8 bytes as its input
    _tile_loadconfig(&config);
  }
  ~AmxScope() { _tile_release(); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

// GCC's tile loads do not tell the compiler that they read memory: what they read has to be stored before
// this.
inline void tile_fence() { asm volatile("" ::: "memory"); }

// Transposes 16 x 16 dwords: pairs of bf16 in row-major order become a tile of B, and back.
inline void transpose_16x16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

#endif

}  // namespace moekern::MOEKERN_ISA
