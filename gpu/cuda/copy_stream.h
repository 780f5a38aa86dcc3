// Copies of one direction beside a device's operations: a stream of their own, and pinned memory of
// the host that they read or write.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace quarry::cuda {

// Used by one thread, with the device's context current.
class CopyStream {
 public:
  // `operations` is the stream that copies run beside; it outlives this.
  static absl::StatusOr<std::unique_ptr<CopyStream>> Create(cudaStream_t operations,
                                                            cudaMemcpyKind kind);
  ~CopyStream();  // waits for what is on its way

  // Behind what the operations' stream has got so far. Returns the number of this copy, counted
  // from 1.
  cudaError_t Start(void* to, const void* from, size_t bytes, uint64_t* number);
  // What the operations' stream gets from now on runs behind copy `number` and those before it.
  cudaError_t WaitFor(uint64_t number);
  // Returns when it and those before it have run.
  cudaError_t Await(uint64_t number);
  cudaError_t AwaitAll();

 private:
  CopyStream(cudaStream_t operations, cudaMemcpyKind kind) : operations_(operations), kind_(kind) {}

  const cudaStream_t operations_;
  const cudaMemcpyKind kind_;
  cudaStream_t copies_ = nullptr;
  cudaEvent_t before_ = nullptr;  // of the operations, when a copy was started
  // Of the latest copies, by number. One that is written over is of an earlier copy, which the
  // later one waits for in any case.
  std::array<cudaEvent_t, 8> done_ = {};
  uint64_t started_ = 0;
};

// Pinned memory of the host.
cudaError_t AllocatePinned(size_t bytes, void** data);

}  // namespace quarry::cuda
