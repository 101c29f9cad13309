#pragma once

#include "common/scalar.h"

namespace moekern {

// Runs fn(T{}) with the storage type of dtype.
template <class Fn>
void dispatch(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(float{});
    case DType::kBFloat16: return fn(bfloat16{});
    case DType::kFloat16: return fn(float16{});
  }
}

}  // namespace moekern
