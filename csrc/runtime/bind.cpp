// The Python module moekern._runtime: what this machine has. No torch in it.

#include <pybind11/pybind11.h>

#include <string>

#include "common/cpu_features.h"
#include "common/isa.h"
#include "runtime/memory.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
  for (const moekern::CpuFeature& feature : moekern::cpu_features()) features[feature.name] = feature.usable;
  return features;
}

std::string cpu_isa() {
  // Not cpu_isa() alone: it may have been read before MOEKERN_CPU_ISA changed.
  moekern::refresh_cpu_isa();
  return moekern::isa_name(moekern::cpu_isa());
}

std::string repr(const moekern::MemoryBudget& b) {
  return "MemoryBudget(limit=" + std::to_string(b.limit) + ", used=" + std::to_string(b.used) +
         ", available=" + std::to_string(b.available) + ", source='" + b.source + "')";
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "What this machine has: instruction sets and memory.";

  m.def(
      "cpu_features", &cpu_features,
      "Instruction sets that the kernels can make use of -> whether the processor has them and the operating "
      "system lets this process use them.");
  m.def("cpu_isa", &cpu_isa,
        "The instruction set that the CPU kernels run with: portable, avx2, avx512, avx512bf16 or amx.\n\n"
        "Raises RuntimeError when MOEKERN_CPU_ISA names an unknown set or one that cannot run here.");

  py::class_<moekern::MemoryBudget>(m, "MemoryBudget",
                                    "How much memory this process can still allocate, in bytes.")
      .def_readonly("limit", &moekern::MemoryBudget::limit,
                    "The limit that binds: of a cgroup, or the machine's memory.")
      .def_readonly("used", &moekern::MemoryBudget::used, "What counts against it and cannot be reclaimed.")
      .def_readonly("available", &moekern::MemoryBudget::available, "limit - used, never negative.")
      .def_readonly("source", &moekern::MemoryBudget::source, "Where the limit was read.")
      .def("__repr__", &repr);
  m.def(
      "memory_budget", &moekern::memory_budget, py::arg("root") = "",
      "The tightest of the machine's available memory and the limits of this process's memory cgroup and its "
      "ancestors (v1 and v2).\n\nPage cache does not count as used: the kernel drops it before it runs out. "
      "`root` is put before every "
      "path that is read.\n\nRaises RuntimeError when <root>/proc/meminfo cannot be read.");
}
