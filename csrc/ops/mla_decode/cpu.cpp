// Three passes: the queries are absorbed (head by head, W_UK read once), rows attend to runs of positions
// (each run's cache read once for up to 128 rows), and the runs are merged and expanded (head by head, W_UV
// read once).
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "ops/mla_decode/block.h"
#include "ops/mla_decode/lanes.h"
#include "ops/mla_decode/params.h"

namespace moekern::MOEKERN_ISA {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Workspace {
  float* queries;  // [B, padded rows, padded R + padded P]; fp32
  float* partial;  // [B, splits, padded rows, padded R], not divided by their sums
  float* maxima;   // [B, splits, padded rows]
  float* sums;     // [B, splits, padded rows]
  float* scratch;  // [threads, scratch_size]
  int64_t scratch_size;
  std::atomic<int64_t> users{0};

  explicit Workspace(const MlaDecodeParams& p)
      : queries(p.workspace),
        partial(queries + p.query_size()),
        maxima(partial + p.partial_size()),
        sums(maxima + p.stats_size()),
        scratch(sums + p.stats_size()),
        scratch_size(p.scratch_size()) {}

  // Scratch of one more thread of a pass.
  float* take() { return scratch + users.fetch_add(1, std::memory_order_relaxed) * scratch_size; }
};

// parallel_dynamic, unless all of it is less work than waking a thread (`work` multiplications and
// additions).
template <class Body>
void for_items(int64_t count, int64_t work, Body&& body) {
  if (work > 200'000) return parallel_dynamic(count, body);
  int64_t item = 0;
  body([&]() -> int64_t { return item < count ? item++ : -1; });
}

template <class From, class To>
inline void convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load_n(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

// Rows of queries as the attention reads them: q_nope W_UK, zeros, q_rope, zeros.
template <class T>
void absorb(const MlaDecodeParams& p, Workspace& work) {
  const auto* q = static_cast<const T*>(p.q);
  const auto* w = static_cast<const T*>(p.w_kv_b);
  const int64_t width = p.padded_width(), padded_rank = p.padded_rank(), tokens = p.batch * p.queries;
  const int64_t nope_stride = (p.nope + 15) / 16 * 16;
  work.users = 0;
  for_items(p.heads, tokens * p.heads * p.nope * p.rank, [&](auto next) {
    float* nope = work.take();
    float* sum = nope + kMlaHeadRows * nope_stride;
    for (int64_t head = next(); head >= 0; head = next()) {
      const T* w_uk = w + head * (p.nope + p.value) * p.w_stride;
      for (int64_t begin = 0; begin < tokens; begin += kMlaHeadRows) {
        const int64_t count = std::min<int64_t>(kMlaHeadRows, tokens - begin);
        const auto q_row = [&](int64_t token) {
          return q + token / p.queries * p.q_stride[0] + token % p.queries * p.q_stride[1] +
                 head * p.q_stride[2];
        };
        for (int64_t m = 0; m < count; ++m) convert(q_row(begin + m), nope + m * nope_stride, p.nope);
        std::fill(sum, sum + count * padded_rank, 0.0f);
        add_rows<T>(
            nope, nope_stride, count, [&](int64_t n) { return w_uk + n * p.w_stride; }, p.nope, p.rank, sum,
            padded_rank);
        for (int64_t m = 0; m < count; ++m) {
          const int64_t token = begin + m;
          const int64_t row = token % p.queries * p.heads + head;
          float* to = work.queries + (token / p.queries * p.padded_rows() + row) * width;
          convert(sum + m * padded_rank, to, padded_rank);
          convert(q_row(token) + p.nope, to + padded_rank, p.rope);
          std::fill(to + padded_rank + p.rope, to + width, 0.0f);
        }
      }
    }
  });
}

// Adds one block to the partial result of `rows` rows, the first of which is row `first` of the sequence.
template <class T>
void attend_block(const MlaDecodeParams& p, const Block<T>& block, const float* queries, int64_t first,
                  int64_t rows, float* scores, float* partial, float* maxima, float* sums) {
  const int64_t padded_rank = p.padded_rank(), width = p.padded_width();
  int visible[kMlaBlock], n = 0;
  for (int t = 0; t < block.count; ++t) {
    if (block.seen[t] != 0) visible[n++] = t;
  }
  std::fill(scores, scores + rows * kMlaBlock, 0.0f);
  dot_rows<T>(
      queries, width, rows, [&](int64_t j) { return block.latent[visible[j]]; }, n, p.rank, scores,
      kMlaBlock);
  if (p.rope > 0) {
    dot_rows<T>(
        queries + padded_rank, width, rows, [&](int64_t j) { return block.k_rope[visible[j]]; }, n, p.rope,
        scores, kMlaBlock);
  }
  const int padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t m = 0; m < rows; ++m) {
    float* s = scores + m * kMlaBlock;
    const int query = static_cast<int>((first + m) / p.heads);
    float best = maxima[m];
    for (int j = 0; j < n; ++j) {
      s[j] = block.uniform || (block.seen[visible[j]] >> query & 1) ? s[j] * p.scale : kNothing;
      best = s[j] > best ? s[j] : best;
    }
    for (int j = n; j < padded; ++j) s[j] = kNothing;
    const float shift = best == kNothing ? 0.0f : best;
    VecF total = zero();
    for (int j = 0; j < padded; j += kLanes) {
      const VecF e = exp(load(s + j) - splat(shift));
      store(s + j, e);
      total += e;
    }
    if (best != maxima[m]) {
      const float decay = std::exp(maxima[m] - shift);
      sums[m] *= decay;
      float* row = partial + m * padded_rank;
      for (int64_t k = 0; k < padded_rank; k += kLanes) store(row + k, load(row + k) * splat(decay));
      maxima[m] = best;
    }
    sums[m] += reduce_add(total);
  }
  add_rows<T>(
      scores, kMlaBlock, rows, [&](int64_t j) { return block.latent[visible[j]]; }, n, p.rank, partial,
      padded_rank);
}

// Attends to the runs of positions; one item is one run, one group of rows of one sequence.
template <class T, bool kLanesAreRows>
void attend(const MlaDecodeParams& p, Workspace& work) {
  const int64_t run = p.split_positions(), groups = p.num_groups();
  work.users = 0;
  const int64_t work_size = p.batch * p.rows() * p.positions * (2 * p.rank + p.rope);
  for_items(p.batch * p.num_splits * groups, work_size, [&](auto next) {
    float* scratch = work.take();
    [[maybe_unused]] const AmxScope<kHaveAmx && kLanesAreRows> tiles;
    Block<T> block;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t b = item / (p.num_splits * groups), split = item / groups % p.num_splits,
                    group = item % groups;
      const int64_t length = length_of(p, b), begin = split * run, end = std::min(begin + run, length);
      if (begin >= end) continue;
      const int64_t first = group * kMlaGroupRows;
      const int64_t rows =
          std::min<int64_t>(kMlaGroupRows, (kLanesAreRows ? p.padded_rows() : p.rows()) - first);
      const int64_t at = (b * p.num_splits + split) * p.padded_rows() + first;
      const float* q = work.queries + (b * p.padded_rows() + first) * p.padded_width();
      float* partial = work.partial + at * p.padded_rank();
      std::fill(partial, partial + rows * p.padded_rank(), 0.0f);
      std::fill(work.maxima + at, work.maxima + at + rows, kNothing);
      std::fill(work.sums + at, work.sums + at + rows, 0.0f);
      const auto each_block = [&](auto add) {
        for (int64_t s = begin; s < end; s += kMlaBlock) {
          find_rows(p, b, s, std::min(s + kMlaBlock, end), length, block);
          if (block.num_visible > 0) add();
        }
      };
      if constexpr (kLanesAreRows) {
        LaneAttention<T> lanes(p, q, first, rows, scratch, partial, work.maxima + at, work.sums + at);
        each_block([&] { lanes.add(block); });
      } else {
        each_block([&] {
          attend_block(p, block, q, first, rows, scratch, partial, work.maxima + at, work.sums + at);
        });
      }
    }
  });
}

// Merges the runs of one row into `merged` [R]; returns its log-sum-exp.
inline float merge(const MlaDecodeParams& p, const Workspace& work, int64_t b, int64_t row, float* merged) {
  const int64_t run = p.split_positions(), active = (length_of(p, b) + run - 1) / run;
  const auto at = [&](int64_t split) { return (b * p.num_splits + split) * p.padded_rows() + row; };
  float best = kNothing, total = 0.0f;
  for (int64_t i = 0; i < active; ++i) best = std::max(best, work.maxima[at(i)]);
  std::fill(merged, merged + p.padded_rank(), 0.0f);
  if (best == kNothing) return kNothing;
  for (int64_t i = 0; i < active; ++i) total += work.sums[at(i)] * std::exp(work.maxima[at(i)] - best);
  for (int64_t i = 0; i < active; ++i) {
    if (work.maxima[at(i)] == kNothing) continue;
    const VecF share = splat(std::exp(work.maxima[at(i)] - best) / total);
    const float* from = work.partial + at(i) * p.padded_rank();
    for (int64_t k = 0; k < p.padded_rank(); k += kLanes) {
      store(merged + k, fma(load(from + k), share, load(merged + k)));
    }
  }
  return best + std::log(total);
}

template <class T>
void expand(const MlaDecodeParams& p, Workspace& work) {
  const auto* w = static_cast<const T*>(p.w_kv_b);
  auto* out = static_cast<T*>(p.out);
  const int64_t padded_rank = p.padded_rank(), tokens = p.batch * p.queries;
  const int64_t value_stride = (p.value + 15) / 16 * 16;
  work.users = 0;
  for_items(p.heads, tokens * p.heads * p.value * p.rank, [&](auto next) {
    float* merged = work.take();
    float* values = merged + kMlaHeadRows * padded_rank;
    for (int64_t head = next(); head >= 0; head = next()) {
      const T* w_uv = w + (head * (p.nope + p.value) + p.nope) * p.w_stride;
      for (int64_t begin = 0; begin < tokens; begin += kMlaHeadRows) {
        const int64_t count = std::min<int64_t>(kMlaHeadRows, tokens - begin);
        for (int64_t m = 0; m < count; ++m) {
          const int64_t token = begin + m, row = token % p.queries * p.heads + head;
          p.lse[token * p.heads + head] = merge(p, work, token / p.queries, row, merged + m * padded_rank);
        }
        std::fill(values, values + count * value_stride, 0.0f);
        dot_rows<T>(
            merged, padded_rank, count, [&](int64_t v) { return w_uv + v * p.w_stride; }, p.value, p.rank,
            values, value_stride);
        for (int64_t m = 0; m < count; ++m) {
          convert(values + m * value_stride, out + ((begin + m) * p.heads + head) * p.value, p.value);
        }
      }
    }
  });
}

template <class T>
void run(const MlaDecodeParams& p) {
  Workspace work(p);
  absorb<T>(p, work);
  if constexpr (kHaveBf16 && std::is_same_v<T, bfloat16>) {
    attend<T, true>(p, work);
  } else {
    attend<T, false>(p, work);
  }
  expand<T>(p, work);
}

}  // namespace

void mla_decode(const MlaDecodeParams& p) {
  dispatch(p.dtype, [&](auto type) { run<decltype(type)>(p); });
}

}  // namespace moekern::MOEKERN_ISA
