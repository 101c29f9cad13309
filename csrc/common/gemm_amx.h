// Tile products with AMX: 2 groups of 16 weight rows x 1 or 2 panels of tokens.
#pragma once

#if defined(__AMX_BF16__)

#include "common/amx.h"
#include "common/gemm_prefetch.h"

namespace moekern::MOEKERN_ISA {

// Where the A tiles of one group come from: [steps] tiles, `step` elements apart, rows `row` bytes apart.
struct TileSource {
  const bfloat16* base;
  int64_t step;
  int64_t row;
};

// One step of the inner dimension.
template <int kPanels>
inline void multiply_step(const bfloat16* a0, const bfloat16* a1, int64_t row0, int64_t row1,
                          const bfloat16* x, int64_t panel_stride, int64_t x_row) {
  _tile_loadd(4, a0, row0);
  _tile_loadd(6, x, x_row);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, a1, row1);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (kPanels == 2) {
    _tile_loadd(7, x + panel_stride, x_row);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// z[panel][group][16 weight rows][16]: sums over `steps` tiles of the sources and, when K is not a multiple
// of 32, the two tiles at `tail`. Tokens past the panel's width are not written.
template <int kPanels>
inline void multiply_tiles(const TileSource a[2], const bfloat16* tail, const bfloat16* x,
                           int64_t panel_stride, int width, int steps, float* z) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kPanels == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t x_row = 4 * width, x_step = kDepth * width;
  for (int s = 0; s < steps; ++s) {
    multiply_step<kPanels>(a[0].base + s * a[0].step, a[1].base + s * a[1].step, a[0].row, a[1].row,
                           x + s * x_step, panel_stride, x_row);
  }
  if (tail != nullptr) {
    multiply_step<kPanels>(tail, tail + kTile * kDepth, 2 * kDepth, 2 * kDepth, x + steps * x_step,
                           panel_stride, x_row);
  }
  _tile_stored(0, z, 64);
  _tile_stored(1, z + 256, 64);
  if constexpr (kPanels == 2) {
    _tile_stored(2, z + 512, 64);
    _tile_stored(3, z + 768, 64);
  }
  tile_fence();
}

// The same sums in the same order, one group after the other: for weights that come from memory. 16 rows are
// 16 streams, which the hardware follows at 29 GB/s (2 cores); 32 at once reach 22 to 24.
template <int kPanels>
inline void stream_tiles(const TileSource a[2], const bfloat16* tail, const bfloat16* x, int64_t panel_stride,
                         int width, int steps, float* z) {
  const int64_t x_row = 4 * width, x_step = kDepth * width;
  for (int g = 0; g < 2; ++g) {
    _tile_zero(0);
    if constexpr (kPanels == 2) _tile_zero(2);
    const bfloat16* w = a[g].base;
    int64_t w_row = a[g].row;
    for (int s = 0; s < steps + (tail != nullptr); ++s) {
      if (s == steps) {
        w = tail + g * kTile * kDepth;
        w_row = 2 * kDepth;
      }
      _tile_loadd(4, w, w_row);
      _tile_loadd(6, x + s * x_step, x_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kPanels == 2) {
        _tile_loadd(7, x + s * x_step + panel_stride, x_row);
        _tile_dpbf16ps(2, 4, 7);
      }
      w += a[g].step;
    }
    _tile_stored(0, z + 256 * g, 64);
    if constexpr (kPanels == 2) _tile_stored(2, z + 512 + 256 * g, 64);
  }
  tile_fence();
}

// The same for packed weights a [step][group][16][32] and two full panels, a part of the inner dimension at a
// time: adds to z unless `first`.
inline void accumulate_tiles(const bfloat16* a, const bfloat16* x0, const bfloat16* x1, int steps, bool first,
                             Prefetcher& ahead, float* z) {
  constexpr int kSize = kTile * kDepth;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, z, 64);
    _tile_loadd(1, z + 256, 64);
    _tile_loadd(2, z + 512, 64);
    _tile_loadd(3, z + 768, 64);
  }
  for (int s = 0; s < steps; ++s) {
    _tile_loadd(6, x0, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + kSize, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, x1, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    ahead.step();
    a += 2 * kSize;
    x0 += kSize;
    x1 += kSize;
  }
  _tile_stored(0, z, 64);
  _tile_stored(1, z + 256, 64);
  _tile_stored(2, z + 512, 64);
  _tile_stored(3, z + 768, 64);
  tile_fence();
}

}  // namespace moekern::MOEKERN_ISA

#endif
