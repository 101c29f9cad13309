// What the bind.cpp of a CUDA leaf needs from torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_target.h"

namespace moekern {

// Makes the tensor's device current and finds torch's current stream on it.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor);
  const CudaTarget& target() const { return target_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CudaTarget target_;
};

}  // namespace moekern
