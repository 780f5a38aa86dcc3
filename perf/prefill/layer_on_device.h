// A made layer on a device, and all that the benchmark asks of the seam (gpu/device.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/sparse/build_index.h"
#include "gpu/thread_team.h"
#include "perf/prefill/made_layer.h"

namespace quarry::perf {

// What PlanSparse gives and AttendSparse takes.
using LayerPlan = std::unique_ptr<SparsePlan>;

// Not thread-safe. Device and layer outlive it.
class LayerOnDevice {
 public:
  // K and V of the whole layer, and room for queries and answers of `most_rows` rows.
  static absl::StatusOr<LayerOnDevice> Put(Device* device, const MadeLayer& layer,
                                           uint32_t most_rows);

  // The queries of all heads of these kinds: of the prefill's last rows, which plans are made by,
  // and of the rows that are attended from now on.
  absl::Status PutLastQueries(std::span<const MadeHead> kinds, ThreadTeam* team);
  absl::Status PutRows(std::span<const MadeHead> kinds, TokenRange rows, ThreadTeam* team);

  // Each returns when the device has done it, and how long that took: milliseconds.
  absl::StatusOr<double> Plan(std::span<const HeadPattern> patterns, LayerPlan* plan);
  // What a plan says of each head.
  static absl::StatusOr<std::vector<HeadPlan>> HeadsOf(const LayerPlan& plan) {
    return plan->Heads();
  }
  // Of the last so many of the rows that are there.
  absl::StatusOr<double> AttendDense(uint32_t rows);
  absl::StatusOr<double> AttendSparse(const LayerPlan& plan);

  // What was attended last for a token: o [heads][head_dim], lse [heads].
  absl::Status Read(uint32_t token, std::span<float> o, std::span<float> lse);

 private:
  LayerOnDevice(Device* device, const MadeLayer* layer) : device_(device), layer_(layer) {}
  absl::Status Wait();
  // With the queries from `q` on, of tokens [rows.lo, rows.hi).
  DeviceAttention Attention(TokenRange rows, const float* q) const;
  size_t width() const { return size_t{layer_->kv().heads} * layer_->kv().head_dim; }

  Device* device_;
  const MadeLayer* layer_;
  DeviceBuffer k_, v_, last_q_, q_, o_, lse_;
  std::vector<float> host_q_;
  std::vector<DeviceKv> part_;
  TokenRange rows_;
};

}  // namespace quarry::perf
