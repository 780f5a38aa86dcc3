// What was purged, and may still lie on the disk.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "proto/types.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"
#include "storage/tenant_names.h"

namespace quarry {

// The latest purge of every block, namespace and tenant, and the segment that has it. Not
// thread-safe.
class PurgeTable {
 public:
  explicit PurgeTable(uint32_t segments) : by_segment_(segments) {}

  // A purge that lies in this segment. Later ones take the places of earlier ones.
  void Add(TenantName tenant, const PurgeFrame& purge, uint32_t segment);
  bool Covers(const LoggedBlock& block) const;

  // Takes those that lie in the segment and may mean blocks born after `oldest`, in as few frames
  // as hold them; those that cannot are forgotten. At most `most` blocks in a frame.
  std::vector<PurgeFrame> Take(uint32_t segment, uint64_t oldest, size_t most);
  // What they would take in frames, at least.
  uint64_t bytes(uint32_t segment) const;

 private:
  struct Key {
    TenantName tenant = nullptr;
    bool has_name_space = false, has_block = false;
    NamespaceDigest name_space;
    BlockId block;
    friend bool operator==(const Key&, const Key&) = default;
    template <typename H>
    friend H AbslHashValue(H h, const Key& key) {
      return H::combine(std::move(h), key.tenant, key.has_name_space, key.has_block, key.name_space,
                        key.block);
    }
  };
  struct Place {
    uint64_t born = 0;
    uint32_t segment = 0;
  };

  void Add(const Key& key, uint64_t born, uint32_t segment);
  uint64_t LatestOf(const Key& key) const;

  absl::flat_hash_map<Key, Place> purges_;
  // Some of the keys have a later place since.
  struct SegmentPurges {
    std::vector<Key> keys;
    absl::flat_hash_set<TenantName> tenants;  // of purges of blocks, which share frames
    uint64_t of_blocks = 0;
  };
  std::vector<SegmentPurges> by_segment_;
};

}  // namespace quarry
