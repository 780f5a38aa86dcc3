#include "gpu/cuda/copy_stream.h"

#include <algorithm>

#include "gpu/cuda/cuda_status.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

// Copies of a size at which the link is as fast as it gets, and between which others of the same
// direction find their turn.
constexpr size_t kPieceBytes = size_t{16} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<CopyStream>> CopyStream::Create(cudaStream_t operations,
                                                               cudaMemcpyKind kind) {
  std::unique_ptr<CopyStream> out(new CopyStream(operations, kind));
  QUARRY_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithFlags(&out->copies_, cudaStreamNonBlocking), "stream"));
  QUARRY_RETURN_IF_ERROR(
      CudaStatus(cudaEventCreateWithFlags(&out->before_, cudaEventDisableTiming), "event"));
  for (cudaEvent_t& event : out->done_) {
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event"));
  }
  return out;
}

CopyStream::~CopyStream() {
  if (copies_ != nullptr) {
    cudaStreamSynchronize(copies_);
    cudaStreamDestroy(copies_);
  }
  if (before_ != nullptr) cudaEventDestroy(before_);
  for (const cudaEvent_t event : done_) {
    if (event != nullptr) cudaEventDestroy(event);
  }
}

cudaError_t CopyStream::Start(void* to, const void* from, size_t bytes, uint64_t* number) {
  *number = 0;
  ++started_;
  cudaError_t error = cudaEventRecord(before_, operations_);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(copies_, before_, 0);
  for (size_t at = 0; at < bytes && error == cudaSuccess; at += kPieceBytes) {
    error =
        cudaMemcpyAsync(static_cast<std::byte*>(to) + at, static_cast<const std::byte*>(from) + at,
                        std::min(kPieceBytes, bytes - at), kind_, copies_);
  }
  if (error == cudaSuccess) error = cudaEventRecord(done_[started_ % done_.size()], copies_);
  if (error == cudaSuccess) {
    *number = started_;
  } else {
    cudaStreamSynchronize(copies_);  // nobody can wait for the pieces that are on their way
  }
  return error;
}

cudaError_t CopyStream::WaitFor(uint64_t number) {
  if (number == 0) return cudaSuccess;
  return cudaStreamWaitEvent(operations_, done_[number % done_.size()], 0);
}

cudaError_t CopyStream::Await(uint64_t number) {
  if (number == 0) return cudaSuccess;
  return cudaEventSynchronize(done_[number % done_.size()]);
}

cudaError_t CopyStream::AwaitAll() { return cudaStreamSynchronize(copies_); }

cudaError_t AllocatePinned(size_t bytes, void** data) {
  const cudaError_t error = cudaHostAlloc(data, std::max<size_t>(1, bytes), cudaHostAllocDefault);
  if (error != cudaSuccess) (void)cudaGetLastError();  // else the next launch would report it
  return error;
}

}  // namespace quarry::cuda
