// ContextTable: the open contexts by id.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "daemon/context.h"
#include "daemon/session_table.h"

namespace quarry {

// Thread-safe.
class ContextTable {
 public:
  explicit ContextTable(uint32_t max_contexts) : max_contexts_(max_contexts) {}

  // Never reused.
  ContextId NextId() { return ContextId{next_id_.fetch_add(1, std::memory_order_relaxed)}; }
  // ResourceExhausted at max_contexts; asked before room is made for another one.
  absl::Status CheckRoom() const;

  // Adds the context to its owner, too; NotFound if that has ended meanwhile.
  absl::Status Insert(std::shared_ptr<Context> context, Session& owner);
  // NotFound also for a context of another tenant.
  absl::StatusOr<std::shared_ptr<Context>> Find(std::string_view tenant, ContextId id) const;
  // Removes and retires it; nothing if it is not there.
  void Close(ContextId id);
  std::vector<std::shared_ptr<Context>> List(std::string_view tenant) const;  // by id
  uint64_t size() const;

 private:
  const uint32_t max_contexts_;
  std::atomic<uint64_t> next_id_{1};
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<ContextId, std::shared_ptr<Context>> contexts_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry
