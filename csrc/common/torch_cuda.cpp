#include "common/torch_cuda.h"

#include <stdexcept>

// Lives in libtorch_cuda, which a CPU-only torch does not have: weak, so that the library loads there all the
// same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace moekern {

CudaScope::CudaScope(const torch::stable::Tensor& tensor)
    : guard_(tensor.get_device()), target_{tensor.get_device(), nullptr} {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("moekern: this torch was built without CUDA");
  }
  if (aoti_torch_get_current_cuda_stream(target_.device, &target_.stream) != 0) {
    throw std::runtime_error("moekern: torch did not give its current CUDA stream");
  }
}

}  // namespace moekern

// 1 when the torch that this library was loaded with has CUDA streams.
extern "C" __attribute__((visibility("default"))) int moekern_cuda_streams() {
  return aoti_torch_get_current_cuda_stream != nullptr ? 1 : 0;
}
