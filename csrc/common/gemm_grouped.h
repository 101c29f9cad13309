// Grouped GEMM over segments: packs the inputs, runs the blocks of weight rows on all threads, and hands each
// finished [rows x columns] piece to a sink.
#pragma once

#include "common/gemm_amx.h"
#include "common/gemm_dot.h"
#include "common/gemm_epilogue.h"
#include "common/gemm_vector.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace moekern::MOEKERN_ISA {

// Inputs of a segment stay in L2 while its weights pass by: at most this many bytes of them.
constexpr int64_t kInputBytes = int64_t{7} << 18;
constexpr int kMaxSegmentRows = 512;

// Up to this many panels load the weights in place, without asking for them ahead: the rows of a block are
// streams for the hardware's prefetcher, which beats prefetch instructions there (13.3 against 10.3 GB/s a
// core at 8 rows an expert, where a plain sequential read reaches 11).
constexpr int kFewPanels = 8;
constexpr int kStepsAtOnce = 8;  // tile steps of K that many_panels copies at once: 16 KiB

template <class T>
inline int segment_rows(int k) {
  const int64_t fit = kInputBytes / (round_up(k, kDepth) * sizeof(typename Layout<T>::Input)) / kTile * kTile;
  return static_cast<int>(std::clamp<int64_t>(fit, kTile, kMaxSegmentRows));
}

// Row slots that a segment takes in the packed inputs.
template <class T>
inline int64_t segment_slots(int rows) {
  return Layout<T>::kPanels && rows > kTile ? round_up(rows, kTile) : rows;
}

template <class T>
struct GroupedGemm {
  using In = typename Layout<T>::Input;
  const Matrices& m;
  const Activation& act;
  const Segment* segments;
  int num_segments;
  const In* x;  // packed inputs

  int64_t k_padded() const { return round_up(m.k, kDepth); }

  // Sink: for panels, panel(segment, expert block, first token, count, z) with z[group][weight row][token];
  // otherwise rows(...) with z[group][token][weight row].
  template <class Sink>
  void run(const Sink& sink) const {
    const int blocks = num_blocks(m, act);
    const int64_t items = static_cast<int64_t>(num_segments) * blocks;
    parallel_dynamic(items, [&](auto next) {
      static thread_local Scratch scratch;
      auto* packed = static_cast<T*>(scratch.get(2 * kTile * k_padded() * sizeof(T)));
      int width = 0;
      int64_t item = next();
      while (item >= 0) {
        const int64_t following = next();
        const Segment& s = segments[item / blocks];
        const int b = static_cast<int>(item % blocks);
        if constexpr (Layout<T>::kPanels) {
          panel_item(s, b, following, blocks, packed, width, sink);
        } else {
          dot_item(s, b, packed, sink);
        }
        item = following;
      }
#if defined(__AMX_BF16__)
      if (width != 0) _tile_release();
#endif
    });
  }

  template <class Sink>
  void dot_item(const Segment& s, int b, T* packed, const Sink& sink) const {
    RowGroup<T> g[2];
    int first[2], step;
    groups_of(m, act, s.expert, b, g, first, &step);
    const int64_t kp = k_padded();
    for (int i = 0; i < 2; ++i) {
      if (g[i].depth == 1) continue;
      T* to = packed + i * kTile * kp;
      pack_group(g[i], 0, m.k, m.k, to, kp);
      g[i] = {to, kp, 1, g[i].rows};
    }
    alignas(64) float z[2 * kTile * kTile];
    for (int t = 0; t < s.rows; t += kTile) {
      const int count = std::min(kTile, s.rows - t);
      for (int i = 0; i < 2; ++i) {
        const int64_t ahead = m.transposed ? 0 : kDotRows * g[i].row;
        dot_block(g[i].w, g[i].row, g[i].rows, x + (s.slot + t) * kp, kp, count, m.k, ahead, z + i * 256,
                  kTile);
      }
      sink.rows(s, b, t, count, z);
    }
  }

#if defined(__AVX512BF16__)
  // What the thread's next item reads, in `steps` portions.
  Prefetcher weights_of(int64_t item, int blocks, int steps) const {
    if (item < 0) return {};
    RowGroup<T> g[2];
    int first[2], step;
    groups_of(m, act, segments[item / blocks].expert, static_cast<int>(item % blocks), g, first, &step);
    return Prefetcher(g, m.k, steps);
  }

  static int num_panels(const Segment& s) { return (s.rows + kTile - 1) / kTile; }

  // Many panels read the same weights: these are copied, a part of K at a time, into 16 KiB that stay in the
  // L1 while all panels pass by. (Loading them in place each time would also meet rows of 4 KiB, which fall
  // into one set of the L1.)
  template <class Sink>
  void many_panels(const Segment& s, int b, const RowGroup<T> g[2], T* packed, Prefetcher& ahead,
                   const Sink& sink) const {
    static thread_local Scratch scratch;
    const int panels = num_panels(s), all_steps = static_cast<int>(k_padded() / kDepth);
    auto* z = static_cast<float*>(scratch.get((panels + 1) / 2 * 4096));
    const T* from = x + s.slot * k_padded();
    for (int at = 0; at < all_steps; at += kStepsAtOnce) {
      const int steps = std::min(kStepsAtOnce, all_steps - at);
      copy_tiles(g, packed, at, steps);
      pass_panels(packed, from + at * s.width * kDepth, panels, s.width, steps, at == 0, ahead, z);
    }
    for (int q = 0; q < panels; ++q) {
      const int t = q * kTile;
      sink.panel(s, b, t, std::min(kTile, s.rows - t), z + 512 * q);
    }
  }

  // Both groups as tiles [step][group][16][32].
  void copy_tiles(const RowGroup<T> g[2], T* packed, int first, int count) const {
    constexpr int kSize = kTile * kDepth;
    const bool full = g[0].rows == kTile && g[1].rows == kTile;
    for (int s = first; s < first + count; ++s) {
      const int depth = std::min(kDepth, m.k - s * kDepth);
      T* to = packed + 2 * (s - first) * kSize;
      if (m.transposed && full && depth == kDepth) {
        pack_transposed(g, s * kDepth, act.gated && act.interleaved, to, to + kSize);
      } else {
        for (int i = 0; i < 2; ++i) pack_group(g[i], s * kDepth, depth, kDepth, to + i * kSize, kDepth);
      }
    }
  }
#endif

#if defined(__AMX_BF16__)
  template <class Sink>
  void panel_item(const Segment& s, int b, int64_t following, int blocks, T* packed, int& width,
                  const Sink& sink) const {
    RowGroup<T> g[2];
    int first[2], step;
    groups_of(m, act, s.expert, b, g, first, &step);
    if (s.width != width) {
      width = s.width;
      configure_tiles(width);
    }
    const int panels = num_panels(s), all_steps = static_cast<int>(k_padded() / kDepth);
    if (panels > kFewPanels) {
      Prefetcher ahead = weights_of(following, blocks, all_steps * ((panels + 1) / 2));
      return many_panels(s, b, g, packed, ahead, sink);
    }
    int steps = all_steps;
    TileSource a[2];
    const T* tail = nullptr;
    const int64_t panel_stride = k_padded() * width;
    const T* from = x + s.slot * k_padded();
    const bool copy = m.transposed || g[0].rows < kTile || g[1].rows < kTile;
    if (copy) {
      copy_tiles(g, packed, 0, all_steps);
      for (int i = 0; i < 2; ++i) a[i] = {packed + i * kTile * kDepth, 2 * kTile * kDepth, 2 * kDepth};
    } else {
      steps = m.k / kDepth;
      for (int i = 0; i < 2; ++i) a[i] = {g[i].w, kDepth, g[i].row * 2};
      if (steps < all_steps) {
        copy_tiles(g, packed, steps, 1);
        tail = packed;
      }
    }
    tile_fence();
    alignas(64) float z[4 * kTile * kTile];
    for (int p = 0; p < panels; p += 2) {
      const int both = std::min(2, panels - p);
      const auto multiply = p == 0 && !copy ? (both == 2 ? stream_tiles<2> : stream_tiles<1>)
                                            : (both == 2 ? multiply_tiles<2> : multiply_tiles<1>);
      multiply(a, tail, from + p * panel_stride, panel_stride, width, steps, z);
      for (int q = 0; q < both; ++q) {
        const int t = (p + q) * kTile;
        sink.panel(s, b, t, std::min(kTile, s.rows - t), z + 512 * q);
      }
    }
  }

  void pass_panels(const T* packed, const T* from, int panels, int, int steps, bool first, Prefetcher& ahead,
                   float* z) const {
    const int64_t panel = k_padded() * kTile;
    tile_fence();
    for (int p = 0; p < panels; p += 2) {
      const T* x0 = from + p * panel;
      // An odd last panel is multiplied twice, the second time for nothing.
      const T* x1 = p + 1 < panels ? x0 + panel : x0;
      accumulate_tiles(packed, x0, x1, steps, first, ahead, z + p * 512);
    }
  }
#elif defined(__AVX512BF16__)
  template <class Sink>
  void panel_item(const Segment& s, int b, int64_t following, int blocks, T* packed, int&,
                  const Sink& sink) const {
    RowGroup<T> g[2];
    int first[2], step;
    groups_of(m, act, s.expert, b, g, first, &step);
    const int all_steps = static_cast<int>(k_padded() / kDepth);
    const bool copy = m.transposed || g[0].rows < kTile || g[1].rows < kTile;
    if (s.rows > kFewTokens || copy) {
      Prefetcher ahead = weights_of(following, blocks, all_steps * passes_of(num_panels(s)));
      return many_panels(s, b, g, packed, ahead, sink);
    }
    const int steps = m.k / kDepth;
    if (steps < all_steps) copy_tiles(g, packed, steps, 1);
    NextRows next[2] = {{g[1], m.k, steps}, {}};
    if (following >= 0) {
      RowGroup<T> h[2];
      groups_of(m, act, segments[following / blocks].expert, static_cast<int>(following % blocks), h, first,
                &step);
      next[1] = {h[0], m.k, steps};
    }
    alignas(64) float z[2 * kTile * kTile];
    for (int i = 0; i < 2; ++i) {
      const T* tail = steps < all_steps ? packed + i * kTile * kDepth : nullptr;
      const T* from = x + s.slot * k_padded();
      if (s.rows == 1) {
        dot_rows(g[i].w, g[i].row, steps, tail, from, z + 256 * i);
      } else {
        kTurnedRows[s.rows - 2](g[i].w, g[i].row, steps, tail, from, next[i], z + 256 * i);
      }
    }
    sink.panel(s, b, 0, s.rows, z);
  }

  // Panels that are multiplied together when `left` remain: never one alone after three.
  static int panels_at_once(int left) { return left == 4 ? 2 : std::min(left, kPanelsAtOnce); }

  // Calls of the prefetcher for one step of K.
  static int passes_of(int panels) {
    int passes = 0;
    for (int p = 0; p < panels; p += panels_at_once(panels - p)) {
      passes += 2 * kTile / kRowsAtOnce[panels_at_once(panels - p) - 1];
    }
    return passes;
  }

  void pass_panels(const T* packed, const T* from, int panels, int width, int steps, bool first,
                   Prefetcher& ahead, float* z) const {
    constexpr decltype(&accumulate_panels<8, 2>) kPass[] = {accumulate_panels<kRowsAtOnce[0], 1>,
                                                            accumulate_panels<kRowsAtOnce[1], 2>,
                                                            accumulate_panels<kRowsAtOnce[2], 3>};
    const int64_t panel = k_padded() * width;
    for (int p = 0, n; p < panels; p += n) {
      n = panels_at_once(panels - p);
      kPass[n - 1](packed, from + p * panel, panel, width, steps, first, ahead, z + p * 512);
    }
  }
#endif
};

// Packs the inputs of all segments. row(i): pointer to the i-th row in sorted order, or null for a row of
// zeros.
template <class T, class Row>
inline void pack_inputs(const Segment* segments, int num_segments, int k, const Row& row,
                        typename Layout<T>::Input* out) {
  using In = typename Layout<T>::Input;
  const int64_t kp = round_up(k, kDepth);
  const int64_t grain =
      std::max<int64_t>(1, (int64_t{1} << 16) / (kp * kTile * static_cast<int64_t>(sizeof(In))));
  // Pieces of 16 rows, counted through all segments.
  int64_t pieces = 0;
  for (int i = 0; i < num_segments; ++i) pieces += (segments[i].rows + kTile - 1) / kTile;
  parallel_for(pieces, grain, [&](int64_t begin, int64_t end) {
    int i = 0;
    int64_t before = 0;
    for (int64_t piece = begin; piece < end; ++piece) {
      while (piece - before >= (segments[i].rows + kTile - 1) / kTile) {
        before += (segments[i].rows + kTile - 1) / kTile;
        ++i;
      }
      const Segment& s = segments[i];
      const int t = static_cast<int>(piece - before) * kTile, count = std::min(kTile, s.rows - t);
      const T* rows[kTile];
      for (int r = 0; r < count; ++r) rows[r] = row(s.first + t + r);
      In* to = out + (s.slot + t) * kp;
#if defined(__AVX512BF16__)
      if constexpr (Layout<T>::kPanels) {
        pack_panel(rows, count, s.width, k, to);
        continue;
      }
#endif
      for (int r = 0; r < count; ++r) {
        if (rows[r] == nullptr) {
          std::fill(to + r * kp, to + (r + 1) * kp, In{});
        } else {
          pack_row(rows[r], k, static_cast<int>(kp), to + r * kp);
        }
      }
    }
  });
}

}  // namespace moekern::MOEKERN_ISA
