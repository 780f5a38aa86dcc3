#include "gpu/cuda/overhead.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "proto/status_macros.h"

namespace quarry::cuda {

uint64_t TakenBytes() {
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? total - free : 0;
}

absl::StatusOr<uint64_t> ContextBytes(const Driver& driver, int device) {
  const uint64_t before = TakenBytes();
  CUcontext context = nullptr;
  QUARRY_RETURN_IF_ERROR(
      driver.Check(driver.create_context(&context, 0, device), "a second context"));
  // Of the new context, by the driver: the runtime would settle in it.
  size_t free = 0, total = 0;
  const absl::Status asked = driver.Check(driver.memory_info(&free, &total), "cuMemGetInfo");
  QUARRY_RETURN_IF_ERROR(driver.Check(driver.destroy_context(context), "the second context's end"));
  QUARRY_RETURN_IF_ERROR(asked);
  const uint64_t during = total - free;
  return during - std::min(before, during);
}

}  // namespace quarry::cuda
