#include "gpu/cuda/upload_stream.h"

#include <algorithm>

#include "gpu/cuda/cuda_status.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

// Copies of a size at which the link is as fast as it gets, and between which others of the same
// direction find their turn.
constexpr size_t kPieceBytes = size_t{16} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<UploadStream>> UploadStream::Create(cudaStream_t operations) {
  std::unique_ptr<UploadStream> out(new UploadStream(operations));
  QUARRY_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithFlags(&out->uploads_, cudaStreamNonBlocking), "stream"));
  QUARRY_RETURN_IF_ERROR(
      CudaStatus(cudaEventCreateWithFlags(&out->before_, cudaEventDisableTiming), "event"));
  for (cudaEvent_t& event : out->done_) {
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event"));
  }
  return out;
}

UploadStream::~UploadStream() {
  if (uploads_ != nullptr) {
    cudaStreamSynchronize(uploads_);
    cudaStreamDestroy(uploads_);
  }
  if (before_ != nullptr) cudaEventDestroy(before_);
  for (const cudaEvent_t event : done_) {
    if (event != nullptr) cudaEventDestroy(event);
  }
}

cudaError_t UploadStream::Start(void* to, std::span<const std::byte> from, uint64_t* number) {
  *number = 0;
  ++started_;
  cudaError_t error = cudaEventRecord(before_, operations_);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(uploads_, before_, 0);
  for (size_t at = 0; at < from.size() && error == cudaSuccess; at += kPieceBytes) {
    error =
        cudaMemcpyAsync(static_cast<std::byte*>(to) + at, from.data() + at,
                        std::min(kPieceBytes, from.size() - at), cudaMemcpyHostToDevice, uploads_);
  }
  if (error != cudaSuccess) return error;
  error = cudaEventRecord(done_[started_ % done_.size()], uploads_);
  if (error == cudaSuccess) *number = started_;
  return error;
}

cudaError_t UploadStream::WaitFor(uint64_t number) {
  if (number == 0) return cudaSuccess;
  return cudaStreamWaitEvent(operations_, done_[number % done_.size()], 0);
}

cudaError_t UploadStream::AllocateHost(size_t bytes, void** data) {
  const cudaError_t error = cudaHostAlloc(data, std::max<size_t>(1, bytes), cudaHostAllocDefault);
  if (error != cudaSuccess) (void)cudaGetLastError();  // else the next launch would report it
  return error;
}

void UploadStream::ReleaseHost(void* data) {
  cudaStreamSynchronize(uploads_);
  cudaFreeHost(data);
}

}  // namespace quarry::cuda
