#include "daemon/prefetcher.h"

#include <pthread.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace quarry {

Prefetcher::Prefetcher(BlockStore* store) : store_(store), thread_([this] { Loop(); }) {
  pthread_setname_np(thread_.native_handle(), "quarry-prefetch");
}

Prefetcher::~Prefetcher() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

absl::Status Prefetcher::Add(std::string_view tenant, std::vector<BlockKey> blocks) {
  if (blocks.empty()) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  if (queue_.size() >= kMostRequests) {
    return absl::ResourceExhaustedError(
        absl::StrCat(queue_.size(), " requests to prefetch wait already"));
  }
  queue_.push_back({std::string(tenant), std::move(blocks)});
  return absl::OkStatus();
}

void Prefetcher::Loop() {
  const auto due = [this]()
                       ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return stopping_ || !queue_.empty(); };
  for (;;) {
    Request request;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&due));
      if (stopping_) return;
      request = std::move(queue_.front());
      queue_.pop_front();
    }
    for (const BlockKey& key : request.blocks) {
      if (stopping()) return;
      const absl::StatusOr<BlockView> view = store_->Acquire(request.tenant, key);
      if (!view.ok()) break;
      store_->Release(view->handle);
    }
  }
}

}  // namespace quarry
