// Copies between pageable memory of the host and the device, by way of pinned memory.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>

#include "absl/status/statusor.h"

namespace quarry::cuda {

// Two slots of pinned memory: one fills or empties while the other is on its way. Used by one
// thread, on one stream.
class Staging {
 public:
  static constexpr size_t kSlotBytes = size_t{4} << 20;
  static absl::StatusOr<std::unique_ptr<Staging>> Create(cudaStream_t stream);
  ~Staging();  // when the stream is idle

  // Fills slots by `fill(slot, offset)`, which writes `slot` with what belongs at `to` + offset;
  // their copies run in the stream's order and may still run when it returns. Slots have kSlotBytes
  // rounded down to a multiple of `unit` (at most kSlotBytes), but for the last.
  cudaError_t Upload(void* to, size_t bytes, size_t unit,
                     const std::function<void(std::span<std::byte> slot, size_t offset)>& fill);
  cudaError_t Upload(void* to, std::span<const std::byte> from);
  // Waits for everything before it in the stream.
  cudaError_t Download(std::span<std::byte> to, const void* from);

 private:
  struct Slot {
    std::byte* data = nullptr;
    cudaEvent_t done = nullptr;  // of the slot's latest copy
  };
  explicit Staging(cudaStream_t stream) : stream_(stream) {}

  const cudaStream_t stream_;
  std::array<Slot, 2> slots_;
  size_t next_ = 0;  // slot
};

}  // namespace quarry::cuda
