#include "gpu/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "gpu/cuda/cuda_status.h"
#include "proto/status_macros.h"

// Returns early with a failed CUDA call.
#define QUARRY_CUDA_TRY(call) \
  if (const cudaError_t quarry_error_ = (call); quarry_error_ != cudaSuccess) return quarry_error_

namespace quarry::cuda {

absl::StatusOr<std::unique_ptr<Staging>> Staging::Create(cudaStream_t stream) {
  std::unique_ptr<Staging> out(new Staging(stream));
  for (Slot& slot : out->slots_) {
    void* data = nullptr;
    QUARRY_RETURN_IF_ERROR(CudaStatus(cudaMallocHost(&data, kSlotBytes), "pinned memory"));
    slot.data = static_cast<std::byte*>(data);
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "event"));
  }
  return out;
}

Staging::~Staging() {
  for (const Slot& slot : slots_) {
    if (slot.done != nullptr) cudaEventDestroy(slot.done);
    if (slot.data != nullptr) cudaFreeHost(slot.data);
  }
}

cudaError_t Staging::Upload(void* to, size_t bytes, size_t unit,
                            const std::function<void(std::span<std::byte>, size_t)>& fill) {
  const size_t step = kSlotBytes / unit * unit;
  for (size_t at = 0; at < bytes; at += step) {
    const size_t n = std::min(step, bytes - at);
    Slot& slot = slots_[next_++ % 2];
    QUARRY_CUDA_TRY(cudaEventSynchronize(slot.done));
    fill({slot.data, n}, at);
    QUARRY_CUDA_TRY(cudaMemcpyAsync(static_cast<std::byte*>(to) + at, slot.data, n,
                                    cudaMemcpyHostToDevice, stream_));
    QUARRY_CUDA_TRY(cudaEventRecord(slot.done, stream_));
  }
  return cudaSuccess;
}

cudaError_t Staging::Upload(void* to, std::span<const std::byte> from) {
  return Upload(to, from.size(), 1, [&](std::span<std::byte> slot, size_t offset) {
    std::memcpy(slot.data(), from.data() + offset, slot.size());
  });
}

cudaError_t Staging::Download(std::span<std::byte> to, const void* from) {
  // The copy of piece i + 1 is under way while piece i leaves its slot.
  const size_t pieces = (to.size() + kSlotBytes - 1) / kSlotBytes;
  const auto piece = [&](size_t i) {
    return to.subspan(i * kSlotBytes, std::min(kSlotBytes, to.size() - i * kSlotBytes));
  };
  for (size_t i = 0; i <= pieces; ++i) {
    if (i < pieces) {
      Slot& slot = slots_[(next_ + i) % 2];
      QUARRY_CUDA_TRY(cudaMemcpyAsync(slot.data,
                                      static_cast<const std::byte*>(from) + i * kSlotBytes,
                                      piece(i).size(), cudaMemcpyDeviceToHost, stream_));
      QUARRY_CUDA_TRY(cudaEventRecord(slot.done, stream_));
    }
    if (i > 0) {
      Slot& slot = slots_[(next_ + i - 1) % 2];
      QUARRY_CUDA_TRY(cudaEventSynchronize(slot.done));
      std::memcpy(piece(i - 1).data(), slot.data, piece(i - 1).size());
    }
  }
  next_ += pieces;
  return cudaStreamSynchronize(stream_);
}

}  // namespace quarry::cuda
