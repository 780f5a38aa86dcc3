// Counts what each tenant has open, so that one never takes everything.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace quarry {

// Thread-safe; outlives its tickets.
class TenantLimit {
 public:
  explicit TenantLimit(uint32_t most) : most_(most) {}

  // One thing that a tenant has open; gives its place back when destroyed. Not thread-safe.
  class Ticket {
   public:
    Ticket() = default;
    Ticket(TenantLimit* limit, std::string tenant) : limit_(limit), tenant_(std::move(tenant)) {}
    Ticket(Ticket&& other) noexcept
        : limit_(std::exchange(other.limit_, nullptr)), tenant_(std::move(other.tenant_)) {}
    Ticket& operator=(Ticket&& other) noexcept {
      if (limit_ != nullptr) limit_->GiveBack(tenant_);
      limit_ = std::exchange(other.limit_, nullptr);
      tenant_ = std::move(other.tenant_);
      return *this;
    }
    ~Ticket() {
      if (limit_ != nullptr) limit_->GiveBack(tenant_);
    }
    bool valid() const { return limit_ != nullptr; }

   private:
    TenantLimit* limit_ = nullptr;
    std::string tenant_;
  };

  // An invalid ticket when the tenant has as many as allowed.
  Ticket Take(const std::string& tenant) {
    const absl::MutexLock lock(&mutex_);
    uint32_t& count = open_[tenant];
    if (count >= most_) return {};
    ++count;
    return {this, tenant};
  }
  uint32_t most() const { return most_; }

 private:
  void GiveBack(const std::string& tenant) {
    const absl::MutexLock lock(&mutex_);
    const auto it = open_.find(tenant);
    if (--it->second == 0) open_.erase(it);
  }

  const uint32_t most_;
  absl::Mutex mutex_;
  std::map<std::string, uint32_t> open_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry
