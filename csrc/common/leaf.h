// What bind.cpp files share: checks, dtype mapping and the registration of leaves together with their C++
// types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <type_traits>

#include "common/scalar.h"

namespace moekern {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16: return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

namespace detail {

template <class T>
constexpr const char* type_name() {
  using U = std::remove_cv_t<std::remove_reference_t<T>>;
  if constexpr (std::is_same_v<U, Tensor>)
    return "Tensor";
  else if constexpr (std::is_same_v<U, std::optional<Tensor>>)
    return "Tensor?";
  else if constexpr (std::is_same_v<U, bool>)
    return "bool";
  else if constexpr (std::is_same_v<U, double>)
    return "float";
  else
    static_assert(std::is_same_v<U, int64_t>, "leaf arguments are Tensor, Tensor?, int64_t, double or bool");
  return "int";
}

void record_leaf(const char* name, const std::string& types);

template <class... Args>
void record(const char* name, void (*)(Args...)) {
  std::string types;
  ((types += types.empty() ? "" : ",", types += type_name<Args>()), ...);
  record_leaf(name, types);
}

}  // namespace detail
}  // namespace moekern

// Inside STABLE_TORCH_LIBRARY_IMPL: implements moekern::<name> with <fn> and records the types that fn takes,
// which moekern/_native.py compares with the schema it declared (torch itself does not, and reads garbage if
// they differ).
#define MOEKERN_LEAF(m, name, fn)          \
  do {                                     \
    ::moekern::detail::record(#name, &fn); \
    m.impl(#name, TORCH_BOX(&fn));         \
  } while (0)
