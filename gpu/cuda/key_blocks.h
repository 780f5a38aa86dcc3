// Key blocks of heads of block patterns, chosen on the card.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/device_plan.h"
#include "gpu/cuda/sparse_kernels.h"
#include "gpu/device.h"

namespace quarry::cuda {

// Used by one thread.
class KeyBlocks {
 public:
  // `most_floats`: of scores of mean queries at a time, but one head's are the least. Both outlive
  // it.
  KeyBlocks(Device* device, SparseKernels* kernels, size_t most_floats)
      : device_(*device), kernels_(*kernels), most_floats_(most_floats) {}

  // Chooses for the attention's rows: writes tiles of the plan's heads of block patterns, and the
  // blocks, to the memory that is given back, as IndexArgs says they lie.
  absl::StatusOr<DeviceBuffer> Choose(const DevicePlan& plan, const DeviceAttention& attention,
                                      uint32_t* tiles);

 private:
  Device& device_;
  SparseKernels& kernels_;
  const size_t most_floats_;
};

}  // namespace quarry::cuda
