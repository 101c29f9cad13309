// AMX tiles: eight registers of 16 rows of 64 bytes. A tile of A holds 16 rows of 32 bf16; a tile of B holds
// 16 pairs of k, each with 16 columns of two bf16 (k, k + 1); C holds 16 x 16 fp32.
#pragma once

#include "common/transpose.h"

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

// Sums (0-3) [16][width] and inputs (6, 7) [16][width][2]; weights (4, 5) [16][32].
inline void configure_tiles(int width) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = 16;
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 64 : 4 * width);
  }
  asm volatile("" ::"m"(config) : "memory");  // the intrinsic names only the first 8 bytes as its input
  _tile_loadconfig(&config);
}

template <>
struct AmxScope<true> {
  AmxScope() { configure_tiles(16); }
  ~AmxScope() { _tile_release(); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

// GCC's tile loads do not tell the compiler that they read memory: what they read has to be stored before
// this.
inline void tile_fence() { asm volatile("" ::: "memory"); }

#endif

}  // namespace moekern::MOEKERN_ISA
