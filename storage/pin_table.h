// Named pins of blocks, by tenant, under quotas.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/types.h"
#include "storage/tenant_names.h"

namespace quarry {

struct PinLimits {
  uint64_t max_bytes_per_tenant = 0;  // of distinct blocks
  uint32_t max_pins_per_tenant = 0;
};

// Not thread-safe. Knows ids and bytes only; its answers say which blocks became pinned or ceased
// to be.
class PinTable {
 public:
  using TenantId = std::pair<TenantName, BlockId>;
  struct SizedBlock {
    BlockId id;
    uint64_t bytes = 0;
  };
  struct Change {
    std::vector<BlockId> gained, lost;
  };

  explicit PinTable(const PinLimits& limits) : limits_(limits) {}

  // Sets the pin to exactly these distinct blocks, replacing an earlier pin of the name.
  // ResourceExhausted over a quota, with the numbers, changing nothing.
  absl::StatusOr<Change> Set(TenantName tenant, std::string_view name,
                             std::span<const SizedBlock> blocks, absl::Time expires);
  // NotFound for a name that this tenant has not set.
  absl::StatusOr<Change> Remove(TenantName tenant, std::string_view name);
  // Removes the pin that ended first, if one ended by `now`; returns whose blocks lost it.
  bool RemoveOneExpired(absl::Time now, TenantName* tenant, Change* change);
  // A block is gone: no pin holds it any more.
  void Forget(TenantName tenant, const BlockId& id);

  std::vector<std::string> NamesOf(TenantName tenant, const BlockId& id) const;
  uint64_t PinnedBytes(TenantName tenant) const;

 private:
  using Key = std::pair<TenantName, std::string>;  // tenant, pin name
  struct Pin {
    std::vector<BlockId> blocks;
    absl::Time expires;
  };
  struct PinnedBlock {
    uint64_t bytes = 0;
    std::set<std::string> names;
  };
  struct Usage {
    uint64_t bytes = 0;
    uint32_t pins = 0;
  };

  absl::Status CheckQuota(const Key& key, std::span<const SizedBlock> blocks) const;
  void Drop(std::map<Key, Pin>::iterator pin, Change* change);
  void DropUsage(TenantName tenant, uint64_t bytes, uint32_t pins);

  const PinLimits limits_;
  std::map<Key, Pin> pins_;
  std::set<std::pair<absl::Time, Key>> by_expiry_;
  absl::flat_hash_map<TenantId, PinnedBlock> by_block_;
  std::map<TenantName, Usage> usage_;
};

}  // namespace quarry
