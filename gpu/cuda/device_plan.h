// What a layer's heads attend in a sparse prefill, on the card.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/cuda/line_args.h"
#include "gpu/device.h"
#include "gpu/sparse/build_index.h"

namespace quarry::cuda {

class DevicePlan final : public SparsePlan {
 public:
  // How many ranges and columns a head has.
  struct Sizes {
    uint32_t ranges = 0, columns = 0;
  };
  // `sizes`: [heads]. Lists of `heads` that are there are copied to the card; where there are none,
  // a kernel writes them to arrays(). The device outlives the plan.
  static absl::StatusOr<std::unique_ptr<DevicePlan>> Make(Device* device,
                                                          std::vector<HeadPlan> heads,
                                                          std::span<const Sizes> sizes);
  // Of plans that the host has made.
  static absl::StatusOr<std::unique_ptr<DevicePlan>> Copy(Device* device,
                                                          std::vector<HeadPlan> heads);
  // All dense, without anything on the card: arrays() must not be asked for.
  static std::unique_ptr<DevicePlan> Dense(Device* device, size_t heads);

  absl::StatusOr<std::vector<HeadPlan>> Heads() const override;

  // Without lists.
  std::span<const HeadPlan> heads() const { return heads_; }
  bool AllDense() const;
  uint32_t columns() const { return columns_; }            // of all heads
  uint32_t column_tiles() const { return column_tiles_; }  // the last of mask_first
  PlanArrays arrays() const;

 private:
  struct Places {
    size_t kind, range_first, column_first, mask_first, blocks, block_place, ranges, range_tiles,
        columns;
  };
  DevicePlan(Device* device, std::vector<HeadPlan> heads)
      : device_(*device), heads_(std::move(heads)) {}

  Device& device_;
  std::vector<HeadPlan> heads_;
  std::vector<Sizes> sizes_;
  Places places_ = {};
  DeviceBuffer memory_;
  uint32_t columns_ = 0, column_tiles_ = 0;
};

}  // namespace quarry::cuda
