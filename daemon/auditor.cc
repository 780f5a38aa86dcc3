#include "daemon/auditor.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include <spdlog/spdlog.h>

#include "daemon/audit_measure.h"
#include "daemon/low_priority.h"

namespace quarry {
namespace {

uint64_t MostDrawn(double fraction) {
  if (fraction >= 1) return UINT64_MAX;
  return static_cast<uint64_t>(std::ldexp(std::max(fraction, 0.0), 64));
}

}  // namespace

Auditor::Auditor(const AuditOptions& options, uint32_t task_tokens)
    : options_(options), task_tokens_(task_tokens), most_drawn_(MostDrawn(options.fraction)) {
  if (most_drawn_ == 0) return;
  {
    absl::MutexLock lock(&mutex_);
    audited_.resize(options.threads);
  }
  for (size_t i = 0; i < options.threads; ++i) {
    threads_.emplace_back([this, i] { Loop(i); });
    pthread_setname_np(threads_.back().native_handle(), "quarry-audit");
  }
}

Auditor::~Auditor() {
  Drain();
  const Hurry hurry;
  for (std::thread& thread : threads_) thread.join();
  absl::MutexLock lock(&mutex_);
  TakeOver();  // what came after the last look
}

void Auditor::Offer(AuditedQuery query) {
  const bool room = waiting_.fetch_add(1, std::memory_order_relaxed) < options_.queue;
  if (!room || ending_.load(std::memory_order_relaxed)) {
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    full_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  auto* const offered = new Offered{std::move(query), nullptr};
  Offered* next = offered_.load(std::memory_order_relaxed);
  do {
    offered->next.release();  // it is another one's until the exchange succeeds
    offered->next.reset(next);
  } while (!offered_.compare_exchange_weak(next, offered, std::memory_order_release,
                                           std::memory_order_relaxed));
  news_.fetch_add(1, std::memory_order_release);
  news_.notify_one();
}

void Auditor::TakeOver() {
  std::unique_ptr<Offered> last(offered_.exchange(nullptr, std::memory_order_acquire));
  const auto oldest = queue_.end() - queue_.begin();
  for (; last != nullptr; last = std::move(last->next)) {
    queue_.insert(queue_.begin() + oldest, std::move(last->query));
  }
}

void Auditor::Drain() {
  std::deque<AuditedQuery> left;  // ends outside the lock
  {
    absl::MutexLock lock(&mutex_);
    ending_.store(true, std::memory_order_relaxed);
    TakeOver();
    left.swap(queue_);
    waiting_.fetch_sub(static_cast<uint32_t>(left.size()), std::memory_order_relaxed);
  }
  news_.fetch_add(1, std::memory_order_release);
  news_.notify_all();
}

void Auditor::LetGo(absl::Duration longest) {
  const Hurry hurry;
  absl::MutexLock lock(&mutex_);
  const auto gone = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return std::all_of(audited_.begin(), audited_.end(), [](const Audited& audited) {
      return audited.subject == nullptr || audited.subject->Memory() != nullptr;
    });
  };
  mutex_.AwaitWithTimeout(absl::Condition(&gone), longest);
}

void Auditor::Flush() {
  absl::MutexLock lock(&mutex_);
  const auto idle = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return waiting_.load(std::memory_order_relaxed) == 0 &&
           std::none_of(audited_.begin(), audited_.end(),
                        [](const Audited& audited) { return audited.busy; });
  };
  mutex_.Await(absl::Condition(&idle));
}

bool Auditor::Take(size_t thread, AuditedQuery* query) {
  for (;;) {
    const uint32_t seen = news_.load(std::memory_order_acquire);
    {
      absl::MutexLock lock(&mutex_);
      TakeOver();
      if (ending_.load(std::memory_order_relaxed)) return false;
      if (!queue_.empty()) {
        *query = std::move(queue_.front());
        queue_.pop_front();
        waiting_.fetch_sub(1, std::memory_order_relaxed);
        audited_[thread] = {true, query->subject.lock()};
        return true;
      }
    }
    news_.wait(seen, std::memory_order_acquire);
  }
}

void Auditor::Loop(size_t thread) {
  RunBehindDecoding();
  AuditedQuery query;
  while (Take(thread, &query)) {
    const OfferingProcessor offering;
    const auto start = std::chrono::steady_clock::now();
    std::shared_ptr<AuditSubject> subject = query.subject.lock();
    const bool done = subject != nullptr && Audit(query, *subject);
    (done ? done_ : given_up_).fetch_add(1, std::memory_order_relaxed);
    const auto time = std::chrono::duration_cast<std::chrono::microseconds>(
        std::chrono::steady_clock::now() - start);
    micros_.fetch_add(static_cast<uint64_t>(time.count()), std::memory_order_relaxed);
    Audited last;  // may hold the last owner: ends outside the lock
    absl::MutexLock lock(&mutex_);
    std::swap(last, audited_[thread]);
  }
}

bool Auditor::Audit(const AuditedQuery& query, AuditSubject& subject) {
  const std::shared_ptr<const BlockTable> table = subject.Memory();
  if (table == nullptr) return false;
  const std::optional<AuditMeasure> measure = MeasureAudit(
      query, subject.shape(), *table, task_tokens_,
      [&] { return ending_.load(std::memory_order_relaxed) || subject.Memory() == nullptr; });
  if (!measure.has_value()) return false;
  AuditTable::Drift drift = AuditTable::Drift::kNone;
  if (measure->renewable) {
    const bool poor = measure->Ratio() > options_.drift_factor;
    if (subject.NoteFit(query.layer, query.kv_head, poor ? IndexFit::kPoor : IndexFit::kGood)) {
      drift = AuditTable::Drift::kFound;
      drifts_.fetch_add(1, std::memory_order_relaxed);
      spdlog::info("indexes do not fit live queries layer={} kv_head={}", query.layer,
                   query.kv_head);
    }
  }
  table_.Add(subject, query.layer, query.kv_head, *measure, drift);
  return true;
}

AuditStats Auditor::stats() const {
  AuditStats stats;
  stats.queued = waiting_.load(std::memory_order_relaxed);
  stats.done = done_.load(std::memory_order_relaxed);
  stats.full = full_.load(std::memory_order_relaxed);
  stats.given_up = given_up_.load(std::memory_order_relaxed);
  stats.drifts = drifts_.load(std::memory_order_relaxed);
  stats.micros = micros_.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace quarry
