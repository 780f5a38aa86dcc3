// Uploads beside a device's operations: a stream of their own, and pinned memory that they read.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"

namespace quarry::cuda {

// Used by one thread, with the device's context current.
class UploadStream {
 public:
  // `operations` is the stream that uploads run beside; it outlives this.
  static absl::StatusOr<std::unique_ptr<UploadStream>> Create(cudaStream_t operations);
  ~UploadStream();  // waits for what is on its way

  // As Device::StartUpload: behind what the operations' stream has got so far. Returns the number
  // of this upload, counted from 1.
  cudaError_t Start(void* to, std::span<const std::byte> from, uint64_t* number);
  // What the operations' stream gets from now on runs behind upload `number` and those before it.
  cudaError_t WaitFor(uint64_t number);

  // Pinned memory of the host; freed when nothing on its way reads it.
  static cudaError_t AllocateHost(size_t bytes, void** data);
  void ReleaseHost(void* data);

 private:
  explicit UploadStream(cudaStream_t operations) : operations_(operations) {}

  const cudaStream_t operations_;
  cudaStream_t uploads_ = nullptr;
  cudaEvent_t before_ = nullptr;  // of the operations, when an upload was started
  // Of the latest uploads, by number. One that is written over is of an earlier upload, which the
  // later one waits for in any case.
  std::array<cudaEvent_t, 8> done_ = {};
  uint64_t started_ = 0;
};

}  // namespace quarry::cuda
