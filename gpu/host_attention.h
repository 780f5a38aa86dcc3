// Attention on the host, by the exact scan that the daemon uses.
#pragma once

#include <cstdint>

#include "gpu/device.h"

namespace quarry {

// Rows [first_row, last_row) of one KV head's query heads. Addresses are the host's. Thread-safe.
void HostAttend(const DeviceAttention& attention, uint32_t kv_head, uint32_t first_row,
                uint32_t last_row);

}  // namespace quarry
