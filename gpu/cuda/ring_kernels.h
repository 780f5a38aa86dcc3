// Attend messages written and answers taken by the card (DeviceRing). Addresses of the channel are
// the host's, which the card has mapped under the same numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/device.h"

namespace quarry::cuda {

// Loads the kernels.
cudaError_t PrepareRingKernels();

// `arrived` is a word of the card that is 0, and is 0 again behind the launch.
cudaError_t LaunchRing(const DeviceRing& ring, uint32_t* arrived, cudaStream_t stream);

// When the message is answered or given up.
cudaError_t LaunchTakeAnswer(const DeviceRing& ring, cudaStream_t stream);

}  // namespace quarry::cuda
