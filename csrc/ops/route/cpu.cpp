#include "ops/route/params.h"
#include "ops/route/sort.h"

namespace moekern::MOEKERN_ISA {

void route(const RouteParams& p) {
  if (p.int64_ids) {
    sort_pairs(static_cast<const int64_t*>(p.ids), p.num_pairs, p.num_experts, p.perm, p.offsets, p.counts);
  } else {
    sort_pairs(static_cast<const int32_t*>(p.ids), p.num_pairs, p.num_experts, p.perm, p.offsets, p.counts);
  }
  std::fill(p.perm + p.offsets[p.num_experts], p.perm + p.num_pairs, -1);
}

}  // namespace moekern::MOEKERN_ISA
