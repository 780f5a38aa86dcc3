// The few driver functions that the runtime has no equal of. They come from the runtime's own
// search, so that nothing links libcuda and a machine without a driver can start the program.
#pragma once

#include <cudaTypedefs.h>

#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quarry::cuda {

struct Driver {
  PFN_cuMemAddressReserve_v10020 reserve_addresses = nullptr;
  PFN_cuMemAddressFree_v10020 free_addresses = nullptr;
  PFN_cuMemGetAllocationGranularity_v10020 granularity = nullptr;
  PFN_cuMemCreate_v10020 create_memory = nullptr;
  PFN_cuMemRelease_v10020 release_memory = nullptr;
  PFN_cuMemMap_v10020 map = nullptr;
  PFN_cuMemUnmap_v10020 unmap = nullptr;
  PFN_cuMemSetAccess_v10020 set_access = nullptr;
  PFN_cuMemGetInfo_v3020 memory_info = nullptr;
  PFN_cuCtxCreate_v3020 create_context = nullptr;
  PFN_cuCtxDestroy_v4000 destroy_context = nullptr;
  PFN_cuGetErrorName_v6000 error_name = nullptr;
  PFN_cuStreamWaitValue32_v11070 wait_value = nullptr;  // null: the driver has none

  // FailedPrecondition names what the driver lacks.
  static absl::StatusOr<Driver> Load();
  // As CudaStatus.
  absl::Status Check(CUresult result, std::string_view what) const;
};

}  // namespace quarry::cuda
