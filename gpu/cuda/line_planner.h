// Columns and slashes of vertical-slash heads, chosen on the card.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/sparse_kernels.h"
#include "gpu/device.h"
#include "gpu/sparse/build_index.h"

namespace quarry::cuda {

// Used by one thread.
class LinePlanner {
 public:
  // `most_bytes`: of working memory, but that of two heads is the least. Both outlive it.
  LinePlanner(Device* device, SparseKernels* kernels, size_t most_bytes)
      : device_(*device), kernels_(*kernels), most_bytes_(most_bytes) {}

  // What was chosen, on the card, and here how much that is.
  struct Kept {
    uint32_t tokens = 0;
    std::vector<Line> lines;
    std::vector<LineTry> results;  // of lines
    DeviceBuffer memory;
    const Line* lines_at = nullptr;
    KeptLines lists = {};
  };
  // Of `heads`, rising, whose patterns NeedsLineScores. Of the inputs the prefill and the patterns
  // are read. Waits for the card, once.
  absl::StatusOr<Kept> Choose(const PlanInputs& inputs, std::span<const uint32_t> heads,
                              const DeviceAttention& last);
  // Writes the lists of the plan's heads that are sparse by what was kept.
  absl::Status Emit(const Kept& kept, const PlanArrays& plan);

 private:
  struct Tried;  // working memory

  static std::vector<Line> LinesOf(const PlanInputs& inputs, std::span<const uint32_t> heads,
                                   uint32_t group);
  absl::StatusOr<Kept> Keep(std::vector<Line> lines, uint32_t tokens);

  Device& device_;
  SparseKernels& kernels_;
  const size_t most_bytes_;
};

}  // namespace quarry::cuda
