// Sparse prefill on a card: plans, indexes, and attention over them, all by its kernels. They
// choose as gpu/sparse/ does on the host; what rounding makes equal may be chosen otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/device_plan.h"
#include "gpu/cuda/key_blocks.h"
#include "gpu/cuda/line_planner.h"
#include "gpu/cuda/sparse_kernels.h"
#include "gpu/device.h"
#include "gpu/sparse/pattern.h"

namespace quarry::cuda {

// The device's PlanSparse and AttendSparse. Working memory is the device's: sums of the last
// queries and what is tried by them, or block means and scores of them; an index; the columns' K
// and V. Used by one thread.
class SparsePrefill {
 public:
  struct Options {
    // Of choosing columns and slashes.
    size_t most_line_bytes = size_t{256} << 20;
    // Floats of scores of key blocks at a time, and weights of key blocks.
    size_t most_floats = size_t{16} << 20;
    // Row tiles that are indexed at a time, where block patterns need lists for each.
    uint32_t most_row_tiles = 256;
    // A layer that cannot save so many key tiles is dense: what plans and indexes cost besides. On
    // an H200 a plan and its index take 0.18 to 0.27 ms, and so many tiles 0.32 ms. 32 heads of
    // 4,096 tokens have 33,792.
    uint64_t least_saved_tiles = 40960;
  };
  // Both outlive it.
  SparsePrefill(Device* device, SparseKernels* kernels, const Options& options);

  // Waits for the card if there are vertical-slash heads, once. Unimplemented names a dtype,
  // head_dim or alignment that the kernels do not take.
  absl::StatusOr<std::unique_ptr<DevicePlan>> Plan(std::span<const HeadPattern> patterns,
                                                   TokenRange prefill, const DeviceAttention& last);
  // By a plan that has something on the card. Waits for nothing.
  absl::Status Attend(const DevicePlan& plan, const DeviceAttention& attention);

 private:
  absl::Status Check(const DeviceAttention& a) const;
  absl::Status AttendRows(const DevicePlan& plan, const DeviceAttention& a);

  const Options options_;
  Device& device_;
  SparseKernels& kernels_;
  LinePlanner lines_;
  KeyBlocks blocks_;
};

}  // namespace quarry::cuda
