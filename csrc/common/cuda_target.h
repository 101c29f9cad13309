// Where a CUDA kernel is to run. Known to kernels and to bind.cpp files; knows neither torch nor CUDA
// headers.
#pragma once

namespace moekern {

struct CudaTarget {
  int device;
  void* stream;  // cudaStream_t
};

}  // namespace moekern
