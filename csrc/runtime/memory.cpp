#include "runtime/memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace moekern {
namespace {

constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

// The file names and counters of one cgroup version.
struct Version {
  const char* name;
  std::vector<const char*> limits;  // any of them binds
  const char* usage;
  // Of memory.stat: page cache on the file LRUs and slab that can be reclaimed. tmpfs and shared memory are
  // on the anonymous LRU and locked pages on the unevictable one, so "cache" or "file" would count too much.
  std::vector<const char*> reclaimable;
  const char* propagates;  // a file that reads 0 in a directory that is not charged for its children, or null
};

// memory.high is a limit too: past it every allocation is throttled to the pace of reclaim.
const Version kV2 = {"cgroup v2",
                     {"memory.max", "memory.high"},
                     "memory.current",
                     {"inactive_file", "active_file", "slab_reclaimable"},
                     nullptr};
// v1 has no hierarchical counter of reclaimable slab.
const Version kV1 = {"cgroup v1",
                     {"memory.limit_in_bytes"},
                     "memory.usage_in_bytes",
                     {"total_inactive_file", "total_active_file"},
                     "memory.use_hierarchy"};

std::optional<uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (file >> value) return value;  // "max" does not parse: no limit
  return std::nullopt;
}

// The value of `key` in lines of "key value" or "key: value kB".
std::optional<uint64_t> read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string name, unit;
    uint64_t value = 0;
    if (!(words >> name >> value)) continue;
    if (name != key && name != key + ":") continue;
    return words >> unit && unit == "kB" ? value * 1024 : value;
  }
  return std::nullopt;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool contains(const std::vector<std::string>& list, const std::string& item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// Where a hierarchy is mounted: `top` of the hierarchy is visible at `point`.
struct Mount {
  std::string top, point;
};

std::optional<Mount> find_mount(const std::string& root, bool v2) {
  std::ifstream file(root + "/proc/self/mountinfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    const std::vector<std::string> left = split(line.substr(0, dash), ' ');
    const std::vector<std::string> right = split(line.substr(dash + 3), ' ');
    if (left.size() < 5 || right.size() < 3) continue;
    const bool fits =
        v2 ? right[0] == "cgroup2" : right[0] == "cgroup" && contains(split(right[2], ','), "memory");
    if (fits) return Mount{left[3], left[4]};
  }
  return std::nullopt;
}

// The path of this process in a hierarchy, from the lines "id:controllers:path" of /proc/self/cgroup.
std::optional<std::string> find_cgroup(const std::string& root, bool v2) {
  std::ifstream file(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (v2 ? controllers.empty() : contains(split(controllers, ','), "memory"))
      return line.substr(second + 1);
  }
  return std::nullopt;
}

// The directories of this process's cgroup and its ancestors below the mount, innermost first.
std::vector<std::string> directories(const std::string& root, bool v2) {
  const std::optional<Mount> mount = find_mount(root, v2);
  const std::optional<std::string> cgroup = find_cgroup(root, v2);
  if (!mount || !cgroup) return {};
  // In a container without a cgroup namespace the path starts with the part of the hierarchy that is mounted.
  // A path that leads elsewhere ("/../x" for a process outside its namespace) leaves the mount point itself.
  std::string below = *cgroup;
  const std::string top = mount->top == "/" ? "" : mount->top;
  if (below.compare(0, top.size(), top) == 0 && (below.size() == top.size() || below[top.size()] == '/')) {
    below = below.substr(top.size());
  } else {
    below.clear();
  }
  if (below.find("/..") != std::string::npos || below == "/") below.clear();
  std::vector<std::string> found;
  for (;;) {
    found.push_back(root + mount->point + below);
    if (below.empty()) return found;
    below = below.substr(0, below.rfind('/'));
  }
}

void tighten(MemoryBudget& budget, const std::string& directory, const Version& version) {
  // "No limit" is "max" in v2 and about 2^63 in v1: both leave more than the machine has.
  uint64_t limit = kNone;
  for (const char* name : version.limits)
    limit = std::min(limit, read_number(directory + "/" + name).value_or(kNone));
  uint64_t used = read_number(directory + "/" + version.usage).value_or(0);
  for (const char* key : version.reclaimable) {
    used -= std::min(used, read_field(directory + "/memory.stat", key).value_or(0));
  }
  const uint64_t available = limit - std::min(limit, used);
  if (available < budget.available) budget = {limit, used, available, version.name + (": " + directory)};
}

MemoryBudget machine(const std::string& root) {
  const std::string path = root + "/proc/meminfo";
  const std::optional<uint64_t> total = read_field(path, "MemTotal");
  const std::optional<uint64_t> available = read_field(path, "MemAvailable");
  if (!total || !available)
    throw std::runtime_error("memory_budget: no MemTotal and MemAvailable in " + path);
  return {*total, *total - std::min(*total, *available), *available, "/proc/meminfo"};
}

}  // namespace

MemoryBudget memory_budget(const std::string& root) {
  MemoryBudget budget = machine(root);
  for (const Version* version : {&kV2, &kV1}) {
    bool innermost = true;
    for (const std::string& directory : directories(root, version == &kV2)) {
      // Without use_hierarchy an ancestor is not charged for what this process uses.
      const bool charged = innermost || version->propagates == nullptr ||
                           read_number(directory + "/" + version->propagates).value_or(1) != 0;
      if (charged) tighten(budget, directory, *version);
      innermost = false;
    }
  }
  return budget;
}

}  // namespace moekern
