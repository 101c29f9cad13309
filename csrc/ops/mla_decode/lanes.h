// The attention of mla_decode for bf16, on AMX or vdpbf16ps. Scores are computed transposed, S^T = latent
// q^T: the cache is read as it lies in memory (the A operand of AMX, broadcast pairs otherwise), and (query,
// head) rows are lanes, so that the softmax over positions works lane by lane. For O = P V the 64 positions
// are interleaved in pairs once for all rows.
#pragma once

#include <limits>

#include "common/amx.h"
#include "ops/mla_decode/block.h"

namespace moekern::MOEKERN_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHaveBf16 = true;
#else
constexpr bool kHaveBf16 = false;
#endif

template <class T>
class LaneAttention;

#if defined(__AVX512BF16__)

template <>
class LaneAttention<bfloat16> {
 public:
  // Rows `first` .. first + rows (a multiple of 16) of one sequence; scratch holds p.scratch_size() floats.
  LaneAttention(const MlaDecodeParams& p, const float* queries, int64_t first, int64_t rows, float* scratch,
                float* partial, float* maxima, float* sums)
      : p_(p),
        first_(first),
        tiles_(rows / 16),
        rank_(p.padded_rank()),
        width_(p.padded_width()),
        partial_(partial),
        maxima_(maxima),
        sums_(sums) {
    scores_ = scratch;
    weights_ = reinterpret_cast<bfloat16*>(scores_ + kMlaBlock * 16);
    gathered_ = weights_ + kMlaBlock * 16;
    pairs_ = gathered_ + kMlaBlock * width_;
    queries_ = pairs_ + kMlaBlock * rank_;
    pack_queries(queries);
  }

  void add(const Block<bfloat16>& block) {
    const bool direct = block.strided && rank_ == p_.rank && width_ - rank_ == p_.rope;
    Rows latent{block.latent[0], p_.latent_stride[1]}, k_rope{block.k_rope[0], p_.rope_stride[1]};
    if (!direct) {
      gather(block);
      latent = {gathered_, width_};
      k_rope = {gathered_ + rank_, width_};
    }
    pack_values(latent);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      score(tile, latent, k_rope);
      soften(tile, block);
      accumulate(tile);
    }
  }

 private:
  struct Rows {
    const bfloat16* data;
    int64_t stride;
  };

  static constexpr int64_t kTile = 512;  // bf16 in a tile

  // Tiles of B: for each 32 columns the queries rounded to bf16 and, of the absorbed part, what the rounding
  // left: of the two roundings on the way to the output this one would weigh more than that of the softmax
  // weights.
  void pack_queries(const float* queries) {
    bfloat16* to = queries_;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      for (int64_t k = 0; k < width_; k += 32) {
        __m512i high[16], low[16];
        for (int64_t m = 0; m < 16; ++m) {
          const int64_t row = tile * 16 + m;
          const bool real = first_ + row < p_.rows();
          const VecF a = real ? load(queries + row * width_ + k) : zero();
          const VecF b = real ? load(queries + row * width_ + k + 16) : zero();
          alignas(64) bfloat16 rounded[32];
          _mm512_store_si512(rounded, high[m] = (__m512i)_mm512_cvtne2ps_pbh(b, a));
          low[m] = (__m512i)_mm512_cvtne2ps_pbh(b - load(rounded + 16), a - load(rounded));
        }
        to = pack_tile(high, to);
        if (k < rank_) to = pack_tile(low, to);
      }
    }
  }

  static bfloat16* pack_tile(__m512i* rows, bfloat16* to) {
    transpose_16x16(rows);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, rows[i]);
    return to + kTile;
  }

  // Visible rows side by side and zero-padded; zeros for the others, so that nothing unseen is read.
  void gather(const Block<bfloat16>& block) {
    for (int t = 0; t < kMlaBlock; ++t) {
      bfloat16* row = gathered_ + t * width_;
      std::fill(row, row + width_, bfloat16{});
      if (t >= block.count || block.seen[t] == 0) continue;
      std::copy(block.latent[t], block.latent[t] + p_.rank, row);
      std::copy(block.k_rope[t], block.k_rope[t] + p_.rope, row + rank_);
    }
  }

  // Tiles of B from the latents: [R / 16][2 halves of the block][16 pairs of positions][16 columns][2].
  void pack_values(Rows latent) {
    alignas(64) uint16_t low_index[32], high_index[32];
    for (int i = 0; i < 16; ++i) {
      low_index[2 * i] = static_cast<uint16_t>(i);
      low_index[2 * i + 1] = static_cast<uint16_t>(32 + i);
      high_index[2 * i] = static_cast<uint16_t>(16 + i);
      high_index[2 * i + 1] = static_cast<uint16_t>(48 + i);
    }
    const __m512i low = _mm512_load_si512(low_index), high = _mm512_load_si512(high_index);
    for (int64_t pair = 0; pair < kMlaBlock / 2; ++pair) {
      const bfloat16* even = latent.data + 2 * pair * latent.stride;
      const bfloat16* odd = even + latent.stride;
      bfloat16* to = pairs_ + pair / 16 * kTile + pair % 16 * 32;
      for (int64_t c = 0; c < rank_; c += 32) {
        const __m512i a = _mm512_loadu_si512(even + c), b = _mm512_loadu_si512(odd + c);
        _mm512_storeu_si512(to + c / 16 * 2 * kTile, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + (c / 16 + 1) * 2 * kTile, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }

#if defined(__AMX_BF16__)
  // scores_ [64 positions][16 rows].
  void score(int64_t tile, Rows latent, Rows k_rope) {
    tile_fence();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const bfloat16* q = queries_ + tile * 16 * (width_ + rank_);
    for (int64_t k = 0; k < rank_; k += 32, q += 2 * kTile) {
      const bfloat16* rows = latent.data + k;
      const int64_t bytes = latent.stride * 2;
      _tile_loadd(4, q, 64);
      _tile_loadd(5, q + kTile, 64);
      _tile_loadd(6, rows, bytes);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(7, rows + 16 * latent.stride, bytes);
      _tile_dpbf16ps(1, 7, 4);
      _tile_dpbf16ps(0, 6, 5);
      _tile_loadd(6, rows + 32 * latent.stride, bytes);
      _tile_dpbf16ps(1, 7, 5);
      _tile_dpbf16ps(2, 6, 4);
      _tile_loadd(7, rows + 48 * latent.stride, bytes);
      _tile_dpbf16ps(3, 7, 4);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
    for (int64_t k = 0; k < width_ - rank_; k += 32, q += kTile) {
      const bfloat16* rows = k_rope.data + k;
      const int64_t bytes = k_rope.stride * 2;
      _tile_loadd(4, q, 64);
      _tile_loadd(5, rows, bytes);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, rows + 16 * k_rope.stride, bytes);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, rows + 32 * k_rope.stride, bytes);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, rows + 48 * k_rope.stride, bytes);
      _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, scores_, 64);
    _tile_stored(1, scores_ + 256, 64);
    _tile_stored(2, scores_ + 512, 64);
    _tile_stored(3, scores_ + 768, 64);
  }

  // partial_ += weights_ V.
  void accumulate(int64_t tile) {
    float* out = partial_ + tile * 16 * rank_;
    const int64_t bytes = rank_ * 4;
    tile_fence();
    _tile_loadd(4, weights_, 64);
    _tile_loadd(5, weights_ + kTile, 64);
    for (int64_t c = 0; c < rank_; c += 32) {  // two tiles of columns: their chains overlap
      const bfloat16* v = pairs_ + c / 16 * 2 * kTile;
      _tile_loadd(0, out + c, bytes);
      _tile_loadd(1, out + c + 16, bytes);
      _tile_loadd(6, v, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v + 2 * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(2, v + kTile, 64);
      _tile_dpbf16ps(0, 5, 2);
      _tile_loadd(3, v + 3 * kTile, 64);
      _tile_dpbf16ps(1, 5, 3);
      _tile_stored(0, out + c, bytes);
      _tile_stored(1, out + c + 16, bytes);
    }
  }
#else
  static __m512bh pair_of(const bfloat16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }

  static __m512bh load_pairs(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

  // scores_ [64 positions][16 rows], 16 positions at a time: 18 loads for 32 products.
  void score(int64_t tile, Rows latent, Rows k_rope) {
    constexpr int kPositions = 16;
    for (int t = 0; t < kMlaBlock; t += kPositions) {
      const bfloat16* q = queries_ + tile * 16 * (width_ + rank_);
      __m512 sum[kPositions] = {};
      for (int64_t k = 0; k < rank_; k += 32, q += 2 * kTile) {
        // The same lines of the next block: a prefetch past the last one is harmless.
        for (int i = 0; i < kPositions; ++i) {
          _mm_prefetch(latent.data + (t + i + kMlaBlock) * latent.stride + k, _MM_HINT_T1);
        }
        for (int j = 0; j < 32; j += 2) {
          const __m512bh high = load_pairs(q + 16 * j), low = load_pairs(q + kTile + 16 * j);
          for (int i = 0; i < kPositions; ++i) {
            const __m512bh pair = pair_of(latent.data + (t + i) * latent.stride + k + j);
            sum[i] = _mm512_dpbf16_ps(sum[i], high, pair);
            sum[i] = _mm512_dpbf16_ps(sum[i], low, pair);
          }
        }
      }
      for (int64_t k = 0; k < width_ - rank_; k += 32, q += kTile) {
        for (int j = 0; j < 32; j += 2) {
          const __m512bh high = load_pairs(q + 16 * j);
          for (int i = 0; i < kPositions; ++i) {
            sum[i] = _mm512_dpbf16_ps(sum[i], high, pair_of(k_rope.data + (t + i) * k_rope.stride + k + j));
          }
        }
      }
      for (int i = 0; i < kPositions; ++i) _mm512_storeu_ps(scores_ + (t + i) * 16, sum[i]);
    }
  }

  // partial_ += weights_ V, 8 rows by 32 columns at a time: 10 loads for 16 products.
  void accumulate(int64_t tile) {
    constexpr int kRows = 8;
    float* out = partial_ + tile * 16 * rank_;
    for (int64_t c = 0; c < rank_; c += 32) {
      const bfloat16* v = pairs_ + c / 16 * 2 * kTile;
      for (int m = 0; m < 16; m += kRows) {
        __m512 sum[kRows][2];
        for (int i = 0; i < kRows; ++i) {
          for (int h = 0; h < 2; ++h) sum[i][h] = _mm512_loadu_ps(out + (m + i) * rank_ + c + 16 * h);
        }
        for (int pair = 0; pair < kMlaBlock / 2; ++pair) {
          const bfloat16* from = v + pair * 32;
          const __m512bh left = load_pairs(from), right = load_pairs(from + 2 * kTile);
          const bfloat16* w = weights_ + pair / 16 * kTile + pair % 16 * 2;
          for (int i = 0; i < kRows; ++i) {
            const __m512bh weight = pair_of(w + (m + i) * 32);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], weight, left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], weight, right);
          }
        }
        for (int i = 0; i < kRows; ++i) {
          for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + (m + i) * rank_ + c + 16 * h, sum[i][h]);
        }
      }
    }
  }
#endif

  // Scores to softmax weights: weights_ [2 halves][16 rows][32 positions]; rescales what was added before.
  void soften(int64_t tile, const Block<bfloat16>& block) {
    const VecF nothing = splat(-std::numeric_limits<float>::infinity()), scale = splat(p_.scale);
    const bool full = block.num_visible == kMlaBlock && block.uniform;
    VecI query_bit{};
    for (int i = 0; i < 16; ++i) {
      query_bit[i] = 1 << std::min<int64_t>((first_ + tile * 16 + i) / p_.heads, p_.queries - 1);
    }
    const VecF before = load(maxima_ + tile * 16);
    VecF best = before;
    for (int t = 0; t < kMlaBlock; ++t) {
      VecF s = load(scores_ + t * 16) * scale;
      if (!full) {
        const int seen = t < block.count ? block.seen[t] : 0;
        s = blend((splat_i(seen) & query_bit) != 0, s, nothing);
      }
      store(scores_ + t * 16, s);
      best = vmax(s, best);
    }
    const VecF shift = blend(best == nothing, zero(), best);
    VecF total = zero();
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 16; ++i) {
      index[2 * i] = static_cast<uint16_t>(i);
      index[2 * i + 1] = static_cast<uint16_t>(16 + i);
    }
    const __m512i interleave = _mm512_load_si512(index);
    for (int half = 0; half < 2; ++half) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const float* s = scores_ + (half * 32 + 2 * i) * 16;
        const VecF even = exp(load(s) - shift), odd = exp(load(s + 16) - shift);
        total += even + odd;
        r[i] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
      }
      transpose_16x16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(weights_ + half * kTile + i * 32, r[i]);
    }
    const VecF decay = exp(before - shift);
    store(sums_ + tile * 16, load(sums_ + tile * 16) * decay + total);
    store(maxima_ + tile * 16, best);
    for (int i = 0; i < 16; ++i) {
      if (before[i] == best[i] || before[i] == nothing[i]) continue;
      float* row = partial_ + (tile * 16 + i) * rank_;
      const VecF factor = splat(decay[i]);
      for (int64_t c = 0; c < rank_; c += 16) store(row + c, load(row + c) * factor);
    }
  }

  const MlaDecodeParams& p_;
  int64_t first_, tiles_, rank_, width_;
  float *partial_, *maxima_, *sums_, *scores_;
  bfloat16 *weights_, *gathered_, *pairs_, *queries_;
};

#endif

}  // namespace moekern::MOEKERN_ISA
