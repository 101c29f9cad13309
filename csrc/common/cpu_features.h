// What the processor has. Apart from isa.h, so that kernel sources, compiled with more than the baseline, see
// no inline functions of the standard library through it.
#pragma once

#include <vector>

namespace moekern {

struct CpuFeature {
  const char* name;  // as in /proc/cpuinfo
  bool usable;       // the processor has it and the operating system lets this process use it
};

// The features that the instruction sets of isa.h are made of, and those worth telling besides. Empty where
// not x86.
const std::vector<CpuFeature>& cpu_features();

}  // namespace moekern
