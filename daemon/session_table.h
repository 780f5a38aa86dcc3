// Sessions: who is attached, and what ends with them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "daemon/held_block.h"
#include "proto/kv_types.h"
#include "proto/types.h"

namespace quarry {

// Thread-safe. Held by shared_ptr: a call in flight keeps its session while EndSession ends it.
class Session {
 public:
  Session(SessionId id, std::string_view tenant, std::string_view name, uint32_t max_leases)
      : id_(id), tenant_(tenant), name_(name), max_leases_(max_leases) {}

  SessionId id() const { return id_; }
  const std::string& tenant() const { return tenant_; }
  const std::string& name() const { return name_; }
  bool ended() const { return ended_.load(std::memory_order_acquire); }

  // NotFound once the session has ended: whoever comes late must give back what it holds.
  absl::Status AddContext(ContextId context);
  void RemoveContext(ContextId context);
  // ResourceExhausted at max_leases.
  absl::StatusOr<BlockLease> AddLease(std::shared_ptr<HeldBlock> block);
  absl::Status RemoveLease(LeaseId lease);
  uint64_t leases() const;

  // Ends all leases; returns the contexts to close.
  std::vector<ContextId> End();

 private:
  const SessionId id_;
  const std::string tenant_;
  const std::string name_;
  const uint32_t max_leases_;
  std::atomic<bool> ended_{false};

  mutable absl::Mutex mutex_;
  uint64_t next_lease_ ABSL_GUARDED_BY(mutex_) = 1;
  absl::flat_hash_map<LeaseId, std::shared_ptr<HeldBlock>> leases_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_set<ContextId> contexts_ ABSL_GUARDED_BY(mutex_);
};

class SessionTable {
 public:
  SessionTable(uint32_t max_sessions, uint32_t max_leases_per_session)
      : max_sessions_(max_sessions), max_leases_(max_leases_per_session) {}

  absl::StatusOr<std::shared_ptr<Session>> Start(std::string_view tenant, std::string_view name);
  absl::StatusOr<std::shared_ptr<Session>> Find(SessionId id) const;
  // Null if it is not there.
  std::shared_ptr<Session> Remove(SessionId id);
  uint64_t size() const;
  uint64_t leases() const;

 private:
  const uint32_t max_sessions_;
  const uint32_t max_leases_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<SessionId, std::shared_ptr<Session>> sessions_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry
