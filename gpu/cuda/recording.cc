#include "gpu/cuda/recording.h"

#include "gpu/cuda/cuda_status.h"
#include "gpu/cuda/overhead.h"
#include "proto/status_macros.h"

namespace quarry::cuda {

RecordedMemory::~RecordedMemory() {
  for (const auto& [data, bytes] : pieces_) arena_->Release(data, bytes);
}

absl::StatusOr<void*> RecordedMemory::Allocate(uint64_t bytes, std::string_view what) {
  if (const auto it = released_.find(bytes); it != released_.end()) {
    void* const data = it->second;
    released_.erase(it);
    return data;
  }
  QUARRY_ASSIGN_OR_RETURN(void* const data, arena_->Allocate(bytes, what));
  pieces_.emplace(data, bytes);
  return data;
}

bool RecordedMemory::Release(void* data) {
  const auto it = pieces_.find(data);
  if (it == pieces_.end()) return false;
  released_.emplace(it->second, data);
  return true;
}

absl::StatusOr<std::unique_ptr<Recording>> Recording::Make(
    cudaStream_t stream, Arena* arena, const std::function<absl::Status(RecordedMemory*)>& call) {
  std::unique_ptr<Recording> out(new Recording(arena));
  // Relaxed: the arena may map pages meanwhile, which is nothing that the stream does.
  QUARRY_RETURN_IF_ERROR(CudaStatus(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed),
                                    "beginning a recording"));
  const absl::Status called = call(&out->memory_);
  struct Graph {
    ~Graph() {
      if (get != nullptr) cudaGraphDestroy(get);
    }
    cudaGraph_t get = nullptr;
  } graph;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph.get);
  QUARRY_RETURN_IF_ERROR(called);
  QUARRY_RETURN_IF_ERROR(CudaStatus(ended, "a recording"));
  const uint64_t before = TakenBytes();
  QUARRY_RETURN_IF_ERROR(
      CudaStatus(cudaGraphInstantiate(&out->graph_, graph.get, 0), "a recording's graph"));
  QUARRY_RETURN_IF_ERROR(CudaStatus(cudaGraphUpload(out->graph_, stream), "a recording's upload"));
  out->overhead_ = CountOverhead(before, arena);
  return out;
}

Recording::~Recording() {
  if (graph_ == nullptr) return;
  const uint64_t before = TakenBytes();
  cudaGraphExecDestroy(graph_);
  ReturnOverhead(before, overhead_, arena_);
}

}  // namespace quarry::cuda
