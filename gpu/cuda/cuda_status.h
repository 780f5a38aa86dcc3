// The one place where CUDA's errors become statuses.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"

namespace quarry::cuda {

// OK for cudaSuccess. Running out of memory is ResourceExhausted, everything else Internal;
// `what` names the operation.
absl::Status CudaStatus(cudaError_t error, std::string_view what);

}  // namespace quarry::cuda
