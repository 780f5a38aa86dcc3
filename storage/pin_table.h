// Named pins of blocks, by tenant, under a byte quota.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/types.h"

namespace quarry {

// Not thread-safe. Knows ids and bytes only; whoever holds it counts pins per block.
class PinTable {
 public:
  explicit PinTable(uint64_t max_bytes_per_tenant) : max_bytes_(max_bytes_per_tenant) {}

  // Sets the pin to exactly these blocks (replacing an earlier pin of the name) and returns the
  // ids of the replaced one. ResourceExhausted over the quota, changing nothing.
  absl::StatusOr<std::vector<BlockId>> Set(std::string_view tenant, std::string_view name,
                                           std::span<const std::pair<BlockId, uint64_t>> blocks,
                                           absl::Time expires);
  // The ids it held. NotFound for an unknown name.
  absl::StatusOr<std::vector<BlockId>> Remove(std::string_view tenant, std::string_view name);
  // Removes pins that ended by `now`; returns what they held.
  std::vector<BlockId> Expire(absl::Time now);
  // A block is gone: no pin holds it any more.
  void Forget(const BlockId& id);
  std::vector<std::string> NamesOf(const BlockId& id) const;

 private:
  using Key = std::pair<std::string, std::string>;  // tenant, name
  struct Pin {
    std::vector<std::pair<BlockId, uint64_t>> blocks;
    absl::Time expires;
    uint64_t bytes = 0;
  };
  std::vector<BlockId> Drop(std::map<Key, Pin>::iterator it);

  const uint64_t max_bytes_;
  std::map<Key, Pin> pins_;
  std::map<std::string, uint64_t, std::less<>> bytes_;        // by tenant
  absl::flat_hash_map<BlockId, std::vector<Key>> by_block_;
};

}  // namespace quarry
