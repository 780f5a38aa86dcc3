// Auditor: compares some live answers with the exact ones, in the background.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "daemon/audit_options.h"
#include "daemon/audit_table.h"
#include "daemon/audited_query.h"
#include "daemon/spread_bits.h"
#include "proto/audit_types.h"

namespace quarry {

// Threads of low priority (`quarry-audit`). What waits holds no memory of its context; what is
// being audited lets go of a closed context within one step: task_tokens, or a run that is searched
// again. Thread-safe.
class Auditor {
 public:
  Auditor(const AuditOptions& options, uint32_t task_tokens);
  // Ends within one step; what waits is let go.
  ~Auditor();
  Auditor(const Auditor&) = delete;
  Auditor& operator=(const Auditor&) = delete;

  // For the decode path: whether this answer is one of those to audit. One atomic addition.
  bool Draw() {
    if (most_drawn_ == 0) return false;
    return SpreadBits(draws_.fetch_add(1, std::memory_order_relaxed)) <= most_drawn_;
  }
  // For the decode path: takes no lock. Where the queue is full the answer is passed by.
  void Offer(AuditedQuery query);

  // No more audits; what waits is let go.
  void Drain();
  // Blocks until no closed context's memory is held, or so long.
  void LetGo(absl::Duration longest);
  // Blocks until what has been offered is audited.
  void Flush();

  // As AuditTable's.
  std::vector<HeadAudit> Of(std::string_view tenant) const { return table_.Of(tenant); }
  std::vector<HeadAudit> OfAll() const { return table_.OfAll(); }
  AuditStats stats() const;

 private:
  // What was offered, the last first, until a thread takes it over.
  struct Offered {
    AuditedQuery query;
    std::unique_ptr<Offered> next;
  };

  void Loop(size_t thread);
  // Waits; false: nothing more to do.
  bool Take(size_t thread, AuditedQuery* query);
  void TakeOver() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool Audit(const AuditedQuery& query, AuditSubject& subject);

  const AuditOptions options_;
  const uint32_t task_tokens_;
  const uint64_t most_drawn_;  // of 2^64 - 1; 0: none
  AuditTable table_;
  std::atomic<uint64_t> draws_{0};
  std::atomic<uint64_t> done_{0}, full_{0}, given_up_{0}, drifts_{0}, micros_{0};
  std::atomic<bool> ending_{false};  // asked between steps
  std::atomic<Offered*> offered_{nullptr};
  std::atomic<uint32_t> waiting_{0};  // offered or queued
  std::atomic<uint32_t> news_{0};     // threads without work wait for it to change
  absl::Mutex mutex_;                 // never taken by Offer
  std::deque<AuditedQuery> queue_ ABSL_GUARDED_BY(mutex_);
  struct Audited {
    bool busy = false;
    std::shared_ptr<AuditSubject> subject;  // null: it has ended
  };
  std::vector<Audited> audited_ ABSL_GUARDED_BY(mutex_);  // per thread
  std::vector<std::thread> threads_;                      // last
};

}  // namespace quarry
