// How the RAM tier chooses what it evicts.
#pragma once

#include <cstdint>

namespace quarry {

enum class EvictionKind { kLru, kS3Fifo, kCost };

struct EvictionOptions {
  EvictionKind kind = EvictionKind::kLru;
  // For kCost, what a miss costs where the disk has no copy: how many bytes of blocks an engine
  // computes in a second at the start of a sequence, and how many blocks further on that takes
  // twice as long, since attention is linear in the position.
  uint64_t recompute_bytes_per_s = 1ull << 30;
  uint32_t recompute_doubling_blocks = 128;
};

}  // namespace quarry
