// How one attention is cut into blocks of threads: host arithmetic without a device.
#pragma once

#include <cstdint>

#include "gpu/device.h"

namespace quarry::cuda {

struct AttentionPlan {
  uint32_t row_tiles = 1;    // 16-row tiles per warp, 1 or 2
  uint32_t query_tiles = 0;  // blocks for the queries of one KV head
  uint32_t splits = 1;       // blocks among which a query tile's keys are shared out
};

// For the tensor kernel on a device of so many multiprocessors, of which so many attentions like
// this one run at once. Few queries (a decode step) leave most of them idle: their keys are split
// until two blocks each are busy, or a block has 256 keys.
AttentionPlan PlanAttention(const DeviceAttention& attention, uint32_t multiprocessors,
                            uint32_t at_once = 1);

}  // namespace quarry::cuda
