// How attentions are cut into blocks of threads: host arithmetic without a device.
#pragma once

#include <cstdint>
#include <span>

#include "gpu/device.h"

namespace quarry::cuda {

struct AttentionPlan {
  uint32_t row_tiles = 1;    // 16-row tiles per warp, 1 or 2
  uint32_t query_tiles = 0;  // blocks for the queries of one KV head
  uint32_t splits = 1;       // blocks among which a query tile's keys are shared out
};

// Of attentions that run at once, for the tensor kernel on a device of so many multiprocessors;
// they differ in their parts and places alone. Few queries (a decode step) leave most of them idle:
// keys are split until two blocks each are busy, which attentions share by their keys, or a block
// has 256 keys. All are split alike.
AttentionPlan PlanAttention(std::span<const DeviceAttention> attentions, uint32_t multiprocessors);

}  // namespace quarry::cuda
