#include <algorithm>
#include <cstring>

#include "common/amx.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "ops/mla_decompress/params.h"

namespace moekern::MOEKERN_ISA {
namespace {

constexpr int64_t kTokens = 32;   // tokens in a block of the product
constexpr int64_t kChunk = 1024;  // tokens that share one packing of a head's weight

// Bytes to memory that is not read soon: whole cache lines bypass the caches, which spares reading them
// first.
inline void stream(char* to, const char* from, int64_t bytes) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
    }
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

inline void stream_zeros(char* to, int64_t bytes) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; bytes >= 64; to += 64, bytes -= 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_setzero_si512());
    }
  }
#endif
  std::memset(to, 0, static_cast<size_t>(bytes));
}

inline void stream_end() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Row t of head h in a [B, H, S, width] tensor, in bytes.
inline char* row_of(void* base, const MlaDecompressParams& p, int64_t b, int64_t h, int64_t t,
                    int64_t width) {
  return static_cast<char*>(base) + ((b * p.heads + h) * p.tokens + t) * width * p.element_size;
}

// The parts of k and v that are no product: the shared rotary key and the zeros behind v.
inline void finish_row(const MlaDecompressParams& p, int64_t b, int64_t h, int64_t t) {
  const int64_t e = p.element_size;
  const char* k_rope = static_cast<const char*>(p.k_rope) + (b * p.rope_stride[0] + t * p.rope_stride[1]) * e;
  stream(row_of(p.k, p, b, h, t, p.nope + p.rope) + p.nope * e, k_rope, p.rope * e);
  stream_zeros(row_of(p.v, p, b, h, t, p.v_width) + p.value * e, (p.v_width - p.value) * e);
}

// From the finished product: one pass over it, written where attention reads it.
void split(const MlaDecompressParams& p) {
  const int64_t e = p.element_size, width = p.nope + p.value;
  // An item is one token's row of one head: about 500 bytes, 64 of them a range worth a thread.
  parallel_for(p.batch * p.heads * p.tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % p.tokens, h = i / p.tokens % p.heads, b = i / p.tokens / p.heads;
      const char* from = static_cast<const char*>(p.kv) + ((b * p.tokens + t) * p.heads + h) * width * e;
      stream(row_of(p.k, p, b, h, t, p.nope + p.rope), from, p.nope * e);
      stream(row_of(p.v, p, b, h, t, p.v_width), from + p.nope * e, p.value * e);
      finish_row(p, b, h, t);
    }
    stream_end();
  });
}

#if defined(__AMX_BF16__)

// Rows of one head's weight as tiles of B: [rows / 16][R / 32][16 pairs][16 rows][2].
void pack_weight(const bfloat16* w, int64_t stride, int64_t rows, int64_t rank, bfloat16* to) {
  for (int64_t row = 0; row < rows; row += 16) {
    for (int64_t k = 0; k < rank; k += 32, to += 512) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(w + (row + i) * stride + k);
      transpose_16x16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, r[i]);
    }
  }
}

// c [32 tokens][32 columns], as [2 halves of the tokens][2 halves of the columns][16][16].
inline void multiply(const bfloat16* latent, int64_t stride, const bfloat16* w0, const bfloat16* w1,
                     int64_t rank, float* c) {
  const int64_t bytes = stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < rank; k += 32) {
    _tile_loadd(4, latent + k, bytes);
    _tile_loadd(6, w0 + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1 + k * 16, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, latent + 16 * stride + k, bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

// One item: one head's columns of up to 1024 tokens of one sequence.
void product(const MlaDecompressParams& p) {
  const int64_t width = p.nope + p.value;
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk;
  parallel_dynamic(p.batch * chunks * p.heads, [&](auto next) {
    const AmxScope<true> tiles;
    static thread_local Scratch scratch;  // aligned: a tile row that crosses a cache line costs two loads
    auto* packed = static_cast<bfloat16*>(scratch.get((width + kTokens) * p.rank * sizeof(bfloat16)));
    bfloat16* tail = packed + width * p.rank;
    alignas(64) float c[4 * 256];
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t h = item % p.heads, b = item / p.heads / chunks, first = item / p.heads % chunks * kChunk;
      const int64_t last = std::min(first + kChunk, p.tokens);
      pack_weight(static_cast<const bfloat16*>(p.w_kv_b) + h * width * p.w_stride, p.w_stride, width, p.rank,
                  packed);
      for (int64_t t = first; t < last; t += kTokens) {
        const int64_t count = std::min(kTokens, last - t);
        const bfloat16* latent =
            static_cast<const bfloat16*>(p.latent) + b * p.latent_stride[0] + t * p.latent_stride[1];
        int64_t stride = p.latent_stride[1];
        if (count < kTokens) {  // a tile always reads 16 rows
          std::fill(tail, tail + kTokens * p.rank, bfloat16{});
          for (int64_t i = 0; i < count; ++i) std::copy_n(latent + i * stride, p.rank, tail + i * p.rank);
          latent = tail;
          stride = p.rank;
        }
        for (int64_t column = 0; column < width; column += 32) {
          tile_fence();
          multiply(latent, stride, packed + column * p.rank, packed + (column + 16) * p.rank, p.rank, c);
          const bool key = column < p.nope;
          char* to = key ? row_of(p.k, p, b, h, t, p.nope + p.rope) + column * 2
                         : row_of(p.v, p, b, h, t, p.v_width) + (column - p.nope) * 2;
          const int64_t row_bytes = (key ? p.nope + p.rope : p.v_width) * 2;
          for (int64_t i = 0; i < count; ++i) {
            const float* from = c + i / 16 * 512 + i % 16 * 16;
            const __m512i row = (__m512i)_mm512_cvtne2ps_pbh(load(from + 256), load(from));
            stream(to + i * row_bytes, reinterpret_cast<const char*>(&row), 64);
          }
        }
        for (int64_t i = 0; i < count; ++i) finish_row(p, b, h, t + i);
      }
    }
    stream_end();
  });
}

#endif

}  // namespace

void mla_decompress(const MlaDecompressParams& p) {
#if defined(__AMX_BF16__)
  if (p.kv == nullptr) return product(p);
#endif
  split(p);
}

}  // namespace moekern::MOEKERN_ISA
