// One block of positions of mla_decode: which queries see them and where their rows are.
#pragma once

#include "ops/mla_decode/params.h"

namespace moekern::MOEKERN_ISA {

template <class T>
struct Block {
  int count;                   // positions, visible or not
  int num_visible;             // positions that at least one query sees
  bool uniform;                // every query sees every visible position
  bool strided;                // all are visible, latent[t] = latent[0] + t * stride, and so k_rope
  uint8_t seen[kMlaBlock];     // bit i: query i sees position t
  const T* latent[kMlaBlock];  // null where no query sees the position
  const T* k_rope[kMlaBlock];
};

inline int64_t length_of(const MlaDecodeParams& p, int64_t b) {
  const int64_t length = p.lengths == nullptr ? p.positions : p.lengths[b];
  return std::clamp<int64_t>(length, 0, p.positions);
}

// Bits of the queries that see position s of sequence b; 8 queries at most.
inline uint8_t seen_by(const MlaDecodeParams& p, int64_t b, int64_t s, int64_t length) {
  uint8_t seen = 0;
  for (int64_t i = 0; i < p.queries; ++i) {
    const int64_t newer = p.causal ? p.queries - 1 - i : 0;
    const bool allowed =
        p.mask == nullptr || p.mask[b * p.mask_stride[0] + i * p.mask_stride[1] + s * p.mask_stride[2]] != 0;
    seen |= static_cast<uint8_t>(s < length - newer && allowed) << i;
  }
  return seen;
}

template <class T>
inline void find_rows(const MlaDecodeParams& p, int64_t b, int64_t begin, int64_t end, int64_t length,
                      Block<T>& block) {
  const auto* latent = static_cast<const T*>(p.latent);
  const auto* k_rope = static_cast<const T*>(p.k_rope);
  const uint8_t all = static_cast<uint8_t>((1u << p.queries) - 1);
  block.count = static_cast<int>(end - begin);
  block.num_visible = 0;
  block.uniform = true;
  const bool plain = p.mask == nullptr && begin + block.count <= length - (p.causal ? p.queries - 1 : 0);
  bool strided = block.count == kMlaBlock;
  for (int t = 0; t < block.count; ++t) {
    const int64_t s = begin + t;
    int64_t outer = b, row = s;
    bool exists = true;
    if (p.block_table != nullptr) {
      outer = p.block_table[b * p.table_stride[0] + s / p.page_size * p.table_stride[1]];
      row = s % p.page_size;
      exists = outer >= 0 && outer < p.num_pages;
    }
    const uint8_t seen = !exists ? uint8_t{0} : plain ? all : seen_by(p, b, s, length);
    block.seen[t] = seen;
    block.latent[t] = seen == 0 ? nullptr : latent + outer * p.latent_stride[0] + row * p.latent_stride[1];
    block.k_rope[t] = seen == 0 ? nullptr : k_rope + outer * p.rope_stride[0] + row * p.rope_stride[1];
    block.num_visible += seen != 0;
    block.uniform = block.uniform && (seen == all || seen == 0);
    strided = strided && seen != 0 && block.latent[t] == block.latent[0] + t * p.latent_stride[1] &&
              block.k_rope[t] == block.k_rope[0] + t * p.rope_stride[1];
  }
  block.strided = strided;
}

}  // namespace moekern::MOEKERN_ISA
