#include "gpu/cuda/overhead.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace quarry::cuda {

uint64_t TakenBytes() {
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? total - free : 0;
}

uint64_t ContextBytes(const Driver& driver, int device) {
  const uint64_t before = TakenBytes();
  CUcontext context = nullptr;
  if (driver.create_context(&context, 0, device) != CUDA_SUCCESS) return before;
  // Of the new context, by the driver: the runtime would settle in it.
  size_t free = 0, total = 0;
  const bool asked = driver.memory_info(&free, &total) == CUDA_SUCCESS;
  driver.destroy_context(context);
  const uint64_t during = asked ? total - free : 2 * before;
  return during - std::min(before, during);
}

uint64_t CountOverhead(uint64_t before, Arena* arena) {
  const uint64_t after = TakenBytes();
  const uint64_t taken = after - std::min(before, after);
  if (taken > 0) arena->SetOverhead(arena->map().overhead() + taken);
  return taken;
}

void ReturnOverhead(uint64_t before, uint64_t counted, Arena* arena) {
  const uint64_t after = TakenBytes();
  const uint64_t returned = std::min(counted, before - std::min(before, after));
  if (returned > 0) arena->SetOverhead(arena->map().overhead() - returned);
}

}  // namespace quarry::cuda
