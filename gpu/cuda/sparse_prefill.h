// Sparse prefill on a card: plans by what its kernels sum, indexes, and attention over them. What
// is chosen by these sums is gpu/sparse/'s, on the host.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/sparse_kernels.h"
#include "gpu/device.h"
#include "gpu/sparse/build_index.h"
#include "gpu/thread_team.h"

namespace quarry::cuda {

// The device's PlanSparse and AttendSparse. Working memory is the device's: scores, sums of them,
// an index, the columns' K and V, and block means. Used by one thread; the choice takes as many as
// the host has.
class SparsePrefill {
 public:
  struct Options {
    // Floats of scores at a time, and of what is downloaded: 64 MiB of each. Those of one head's
    // last queries and all tokens are the least.
    size_t most_floats = size_t{16} << 20;
    // Row tiles that are indexed at a time, where block patterns need lists for each.
    uint32_t most_row_tiles = 256;
    uint32_t threads = 0;  // of the choice; 0: all cores
  };
  // Both outlive it.
  SparsePrefill(Device* device, SparseKernels* kernels, const Options& options);

  // Unimplemented names a dtype, head_dim or alignment that the kernels do not take.
  absl::StatusOr<std::vector<HeadPlan>> Plan(std::span<const HeadPattern> patterns,
                                             TokenRange prefill, const DeviceAttention& last);
  absl::Status Attend(std::span<const HeadPlan> plans, const DeviceAttention& attention);

 private:
  struct Weights;  // of blocks

  absl::Status Check(const DeviceAttention& a) const;
  // How many of `each` floats fit, at least one.
  size_t ThatFit(size_t each) const;
  absl::Status PlanLines(const PlanInputs& inputs, std::span<const uint32_t> heads,
                         const DeviceAttention& last, std::vector<HeadPlan>* plans);
  absl::StatusOr<Weights> WeighBlocks(std::span<const HeadPlan> plans, const DeviceAttention& a);
  // Of heads of one pattern, `step` row tiles at a time.
  absl::Status WeighHeads(const Pattern& pattern, const DeviceAttention& a, uint32_t step,
                          ScoreArgs score, const Weights& shape, float* out);
  absl::Status AttendRows(std::span<const HeadPlan> plans, const DeviceAttention& a);
  absl::Status Run(const SparseIndex& index, const DeviceAttention& a);

  const Options options_;
  Device& device_;
  SparseKernels& kernels_;
  ThreadTeam team_;
  std::vector<float> host_;  // what was downloaded last: as large as ever needed
};

}  // namespace quarry::cuda
