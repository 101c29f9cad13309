// How much memory this process can still allocate, for sizing caches of experts.

#pragma once

#include <cstdint>
#include <string>

namespace moekern {

struct MemoryBudget {
  uint64_t limit = 0;      // bytes: the limit that binds (of a cgroup, else the machine's MemTotal)
  uint64_t used = 0;       // bytes charged against it that cannot be reclaimed
  uint64_t available = 0;  // bytes that can still be allocated: limit - used, never negative
  std::string source;      // "cgroup v2: <directory>", "cgroup v1: <directory>" or "/proc/meminfo"
};

// The tightest of: MemAvailable, and the limits of this process's memory cgroup and of every ancestor of it.
// A cgroup is charged for page cache too; the kernel drops that before it kills, so it does not count as
// used. `root` is put in front of every path that is read (tests give a directory with a fake /proc and
// /sys). Throws std::runtime_error when not even <root>/proc/meminfo can be read.
MemoryBudget memory_budget(const std::string& root = "");

}  // namespace moekern
