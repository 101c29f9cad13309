// mla_decode: absorbed attention of Q query tokens over a latent cache. B batch, Q query tokens, S positions,
// H heads, R latent rank, N nope width, P rope width, V value width.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace moekern {

constexpr int kMlaBlock = 64;       // positions that are scored and added at a time
constexpr int kMlaGroupRows = 128;  // (query, head) rows that share one pass over the cache
constexpr int kMlaHeadRows = 32;    // query rows that share one pass over a head's part of the weight

struct MlaDecodeParams {
  const void* q;               // [B, Q, H, N + P]
  const void* latent;          // [B, S, R] or [num_pages, page_size, R]
  const void* k_rope;          // [B, S, P] or [num_pages, page_size, P]
  const void* w_kv_b;          // [H * (N + V), R]
  const int32_t* lengths;      // [B] or null: all S
  const uint8_t* mask;         // [B, Q, S] or null
  const int32_t* block_table;  // [B, max_pages] or null
  void* out;                   // [B, Q, H, V], contiguous
  float* lse;                  // [B, Q, H], contiguous
  float* workspace;            // workspace_size() floats, 64-byte aligned
  DType dtype;
  int64_t batch, queries, heads, rank, nope, rope, value, positions;
  int64_t num_pages, page_size;  // page_size: S without a block table
  int64_t q_stride[3];           // strides in elements
  int64_t latent_stride[2], rope_stride[2];
  int64_t w_stride;
  int64_t mask_stride[3];
  int64_t table_stride[2];
  float scale;
  bool causal;
  int64_t num_splits;  // runs of positions that are attended to apart and merged
  int64_t num_threads;

  int64_t rows() const { return queries * heads; }  // row: query * H + head
  int64_t padded_rows() const { return (rows() + 15) / 16 * 16; }
  int64_t padded_rank() const { return (rank + 31) / 32 * 32; }
  int64_t padded_rope() const { return (rope + 31) / 32 * 32; }
  int64_t padded_width() const { return padded_rank() + padded_rope(); }
  int64_t group_rows() const { return std::min<int64_t>(padded_rows(), kMlaGroupRows); }
  int64_t num_groups() const { return (padded_rows() + kMlaGroupRows - 1) / kMlaGroupRows; }
  int64_t split_positions() const {
    const int64_t share = (positions + num_splits - 1) / num_splits;
    return std::max<int64_t>((share + kMlaBlock - 1) / kMlaBlock * kMlaBlock, kMlaBlock);
  }

  // Workspace, in floats: absorbed queries, partial outputs, their maxima and sums, then each thread's
  // scratch.
  int64_t query_size() const { return batch * padded_rows() * padded_width(); }
  int64_t partial_size() const { return batch * num_splits * padded_rows() * padded_rank(); }
  int64_t stats_size() const { return batch * num_splits * padded_rows(); }
  int64_t scratch_size() const {
    const int64_t block =
        kMlaBlock * (padded_width() + padded_rank()) / 2;  // gathered rows, and V in pairs: 2 bytes
    const int64_t queries = group_rows() * padded_width();
    const int64_t scores = std::max<int64_t>(group_rows(), 32) * kMlaBlock;
    const int64_t head = kMlaHeadRows * (padded_rank() + (nope + value + 15) / 16 * 16);
    return block + queries + scores + head;
  }
  int64_t workspace_size() const {
    return query_size() + partial_size() + 2 * stats_size() + num_threads * scratch_size();
  }
};

MOEKERN_CPU_KERNEL(mla_decode, MlaDecodeParams)

}  // namespace moekern
