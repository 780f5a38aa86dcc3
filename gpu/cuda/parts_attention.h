// Attention over parts of K and V: how what the seam asks for becomes launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "gpu/cuda/attention_args.h"
#include "gpu/device.h"

namespace quarry::cuda {

// Working memory is allocated from the device for the time of an attention. Used by one thread, on
// one stream.
class PartsAttention {
 public:
  // Device and stream outlive it.
  PartsAttention(Device* device, uint32_t multiprocessors, cudaStream_t stream)
      : device_(device), multiprocessors_(multiprocessors), stream_(stream) {}

  // As Device's; rows and heads are not 0.
  absl::Status Attend(const DeviceAttention& attention);
  // As Device's; those that are alike are one launch.
  absl::Status AttendEach(std::span<const DeviceAttention> attentions);

 private:
  struct Launch {
    AttentionArgs args;      // but for o and lse
    uint32_t row_tiles = 0;  // of the tensor kernel; 0: the plain one's
  };
  absl::Status AttendTogether(std::span<const DeviceAttention> attentions);
  // Launches of the same rows over other parts, and the merge of what they give. first: the first
  // of the rows' attentions.
  absl::Status Run(std::vector<Launch> launches, const DeviceAttention& first);

  Device* const device_;
  const uint32_t multiprocessors_;
  const cudaStream_t stream_;
};

}  // namespace quarry::cuda
