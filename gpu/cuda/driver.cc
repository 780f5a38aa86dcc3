#include "gpu/cuda/driver.h"

#include <cuda_runtime_api.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

template <typename Function>
absl::Status Find(const char* name, unsigned version, Function** out) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("the NVIDIA driver has no ", name, " of CUDA ", version / 1000, ".",
                     version % 1000 / 10));
  }
  *out = reinterpret_cast<Function*>(found);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Driver> Driver::Load() {
  Driver d;
  QUARRY_RETURN_IF_ERROR(Find("cuMemAddressReserve", 10020, &d.reserve_addresses));
  QUARRY_RETURN_IF_ERROR(Find("cuMemAddressFree", 10020, &d.free_addresses));
  QUARRY_RETURN_IF_ERROR(Find("cuMemGetAllocationGranularity", 10020, &d.granularity));
  QUARRY_RETURN_IF_ERROR(Find("cuMemCreate", 10020, &d.create_memory));
  QUARRY_RETURN_IF_ERROR(Find("cuMemRelease", 10020, &d.release_memory));
  QUARRY_RETURN_IF_ERROR(Find("cuMemMap", 10020, &d.map));
  QUARRY_RETURN_IF_ERROR(Find("cuMemUnmap", 10020, &d.unmap));
  QUARRY_RETURN_IF_ERROR(Find("cuMemSetAccess", 10020, &d.set_access));
  QUARRY_RETURN_IF_ERROR(Find("cuMemGetInfo", 3020, &d.memory_info));
  QUARRY_RETURN_IF_ERROR(Find("cuCtxCreate", 3020, &d.create_context));
  QUARRY_RETURN_IF_ERROR(Find("cuCtxDestroy", 4000, &d.destroy_context));
  QUARRY_RETURN_IF_ERROR(Find("cuGetErrorName", 6000, &d.error_name));
  (void)Find("cuStreamWaitValue32", 11070, &d.wait_value);  // stays null
  return d;
}

absl::Status Driver::Check(CUresult result, std::string_view what) const {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const char* name = nullptr;
  if (error_name(result, &name) != CUDA_SUCCESS || name == nullptr) name = "unknown error";
  const std::string message = absl::StrCat(std::string(what), ": ", name);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return absl::ResourceExhaustedError(message);
  return absl::InternalError(message);
}

}  // namespace quarry::cuda
