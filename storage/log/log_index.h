// Which blocks the log has, and where.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "proto/types.h"
#include "storage/log/frames.h"
#include "storage/tenant_names.h"

namespace quarry {

// A frame and the bytes behind it.
struct LoggedPart {
  FramePlace place;
  uint64_t sequence = 0;
  uint64_t frame_bytes = 0;
  uint64_t part_offset = 0, part_bytes = 0;  // in the block
  friend bool operator==(const LoggedPart&, const LoggedPart&) = default;

  uint64_t disk_bytes() const;  // with the frame
};

struct LoggedBlock {
  TenantName tenant = nullptr;
  BlockId id, parent;
  NamespaceDigest name_space;
  uint64_t bytes = 0;
  uint64_t born = 0;
  uint32_t uses = 0;              // since it was written, half of those before it was moved
  std::vector<LoggedPart> parts;  // by offset, together the whole block
  // What `born` was when this start first had it: the same wherever it is moved, so that it is told
  // from a later block of its id.
  uint64_t origin = 0;
  uint32_t holders = 0;  // readers for whose sake it is not dropped

  bool held() const { return holders > 0; }
  uint64_t disk_bytes() const;

  void Use() {
    if (uses < ~0u) ++uses;
  }
};

// Not thread-safe.
class LogIndex {
 public:
  explicit LogIndex(uint32_t segments) : live_bytes_(segments), held_bytes_of_(segments) {}

  // In place of an earlier one with its id, which nobody holds then: it is gone.
  void Add(LoggedBlock block);
  // In place of the same block elsewhere, with its holders.
  void Move(LoggedBlock block);
  // Null: it has none of this id, or there is no such tenant.
  LoggedBlock* Find(TenantName tenant, const BlockId& id);
  const LoggedBlock* Find(TenantName tenant, const BlockId& id) const;
  void Remove(TenantName tenant, const BlockId& id);
  // One holder more of a block that is there; one less, if it still is.
  void Hold(LoggedBlock* block);
  void Release(TenantName tenant, const BlockId& id, uint64_t origin);
  // The tenant's, of the namespace if one is given, with these ids if there are any. Returns how
  // many there were.
  uint64_t Purge(TenantName tenant, const std::optional<NamespaceDigest>& name_space,
                 std::span<const BlockId> blocks);

  // At most `limit` of the tenant's.
  std::vector<const LoggedBlock*> List(TenantName tenant, uint32_t limit) const;

  uint64_t live_bytes(uint32_t segment) const { return live_bytes_[segment]; }
  // Of blocks that are held, frames included; of all segments, and of one.
  uint64_t held_bytes() const { return held_bytes_; }
  uint64_t held_bytes(uint32_t segment) const { return held_bytes_of_[segment]; }
  uint64_t blocks() const { return blocks_.size(); }
  uint64_t bytes() const { return bytes_; }  // of blocks, without frames

 private:
  using Key = std::pair<TenantName, BlockId>;
  template <typename Predicate>
  uint64_t RemoveIf(Predicate predicate);
  void Count(const LoggedBlock& block, int sign);
  void CountHeld(const LoggedBlock& block, int sign);

  absl::flat_hash_map<Key, LoggedBlock> blocks_;
  std::vector<uint64_t> live_bytes_, held_bytes_of_;  // by segment, frames included
  uint64_t held_bytes_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace quarry
