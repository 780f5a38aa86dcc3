// Operations kept as a CUDA graph, with the device memory that they take while they run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "gpu/cuda/arena.h"
#include "gpu/device.h"

namespace quarry::cuda {

// What operations allocate for their time while they are recorded. It is theirs until the recording
// goes, for a replay writes there whenever it comes; one after the other they use it again.
class RecordedMemory {
 public:
  explicit RecordedMemory(Arena* arena) : arena_(arena) {}
  ~RecordedMemory();
  RecordedMemory(const RecordedMemory&) = delete;
  RecordedMemory& operator=(const RecordedMemory&) = delete;

  // As the arena's.
  absl::StatusOr<void*> Allocate(uint64_t bytes, std::string_view what);
  // False if it is not from here.
  bool Release(void* data);

 private:
  Arena* const arena_;
  std::map<void*, uint64_t> pieces_;         // with their bytes
  std::multimap<uint64_t, void*> released_;  // of these, by bytes
};

// Used by the arena's thread, with the device's context current; the arena and the stream outlive
// it.
class Recording final : public DeviceRecording {
 public:
  // What `call` gives the stream, with memory from `memory` that was there before. Error of the
  // call, or of a graph that cannot be made; what it takes of the card beside the arena is
  // overhead.
  static absl::StatusOr<std::unique_ptr<Recording>> Make(
      cudaStream_t stream, Arena* arena, const std::function<absl::Status(RecordedMemory*)>& call);
  ~Recording() override;

  cudaError_t Replay(cudaStream_t stream) const { return cudaGraphLaunch(graph_, stream); }

 private:
  explicit Recording(Arena* arena) : arena_(arena), memory_(arena) {}

  Arena* const arena_;
  RecordedMemory memory_;
  uint64_t overhead_ = 0;  // that the graph took
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace quarry::cuda
