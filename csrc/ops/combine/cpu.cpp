#include "ops/combine/sum.h"

namespace moekern::MOEKERN_ISA {

void combine(const CombineParams& p) {
  dispatch(p.dtype, [&](auto type) { sum_pairs<decltype(type)>(p); });
}

}  // namespace moekern::MOEKERN_ISA
