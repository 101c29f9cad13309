// Loops over the caller's thread pool. Kernels know only this; bind code connects it to torch's intra-op
// pool.
#pragma once

#include <atomic>
#include <cstdint>

namespace moekern {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, count) into at most one range per thread, none shorter than grain, and waits for all of them.
void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context);
int num_threads();

// fn(begin, end) on static ranges of [0, count).
template <class Fn>
void parallel_for(int64_t count, int64_t grain, Fn&& fn) {
  if (count <= 0) return;
  if (count <= grain) return fn(int64_t{0}, count);
  parallel_ranges(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<Fn*>(context))(begin, end); }, &fn);
}

// body(next) once per thread; next() hands out 0 .. count-1, each once, then -1. For items of unequal cost.
// What an item computes must not depend on the thread that took it.
template <class Body>
void parallel_dynamic(int64_t count, Body&& body) {
  if (count <= 0) return;
  std::atomic<int64_t> taken{0};
  auto next = [&taken, count]() -> int64_t {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : -1;
  };
  const int64_t threads = count < num_threads() ? count : num_threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(next);
  });
}

}  // namespace moekern
