// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace moekern {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("moekern: ") + what + " failed: " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

}  // namespace moekern

#define MOEKERN_CUDA_CHECK(call) ::moekern::check_cuda((call), #call)

// After a launch: a bad configuration is reported at once, without waiting for the kernel.
#define MOEKERN_CUDA_CHECK_LAUNCH(kernel) ::moekern::check_cuda(cudaGetLastError(), "launch of " #kernel)
