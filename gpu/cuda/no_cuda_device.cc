// In place of the CUDA device where there is no toolkit to build it with.
#include "gpu/cuda/cuda_device.h"

namespace quarry {

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions&) {
  return absl::FailedPreconditionError("this program was built without CUDA");
}

}  // namespace quarry
