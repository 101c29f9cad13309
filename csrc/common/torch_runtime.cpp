// The only file, beside the bind.cpp's, that knows of torch: its thread pool, and the list of leaves.
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/leaf.h"
#include "common/parallel.h"

namespace moekern {
namespace {

std::string& leaves() {
  static std::string lines;  // a function static: bind files register before main in any order
  return lines;
}

}  // namespace

void detail::record_leaf(const char* name, const std::string& types) {
  leaves() += std::string(name) + "|" + types + "\n";
}

void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context) {
  if (torch_parallel_for(0, count, grain, fn, context) != 0) {
    throw std::runtime_error("moekern: an exception escaped a CPU kernel");
  }
}

int num_threads() {
  uint32_t n = 1;
  if (torch_get_num_threads(&n) != 0 || n == 0) return 1;
  return static_cast<int>(n);
}

}  // namespace moekern

#define MOEKERN_EXPORT extern "C" __attribute__((visibility("default")))

// One line per leaf: name|type,type,...
MOEKERN_EXPORT const char* moekern_leaf_signatures() { return moekern::leaves().c_str(); }

// Name of the instruction set of the CPU kernels; nullptr: the one in MOEKERN_CPU_ISA cannot run here.
MOEKERN_EXPORT const char* moekern_cpu_isa() {
  try {
    return moekern::isa_name(moekern::cpu_isa());
  } catch (const std::exception&) {
    return nullptr;
  }
}

// The same; reads MOEKERN_CPU_ISA again. nullptr: that set cannot run
// here.
MOEKERN_EXPORT const char* moekern_refresh_cpu_isa() {
  try {
    moekern::refresh_cpu_isa();
    return moekern::isa_name(moekern::cpu_isa());
  } catch (const std::exception&) {
    return nullptr;
  }
}
