// route: expert ids -> the pairs of each expert. P = T*K pairs, E experts.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace moekern {

struct RouteParams {
  const void* ids;   // [P], int64 or int32
  int32_t* perm;     // [P]
  int32_t* offsets;  // [E+1]
  int32_t* counts;   // [E]
  int64_t num_pairs;
  int num_experts;
  bool int64_ids;
};

MOEKERN_CPU_KERNEL(route, RouteParams)

}  // namespace moekern
