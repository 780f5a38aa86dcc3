#include "daemon/run_registry.h"

#include <algorithm>

#include "proto/check.h"

namespace quarry {

std::shared_ptr<const Run> RunRegistry::GetOrBuild(
    uint32_t i, const KvShape& shape, std::span<const std::shared_ptr<HeldBlock>> blocks) {
  QUARRY_CHECK(!blocks.empty() && blocks.back()->published());
  const Key key{blocks.back()->id(), i, shape};
  {
    absl::MutexLock lock(&mutex_);
    if (auto it = runs_.find(key); it != runs_.end()) {
      if (std::shared_ptr<const Run> run = it->second.lock()) return run;
    }
  }
  // Built outside the mutex; if two contexts build the same run, the first to insert wins.
  auto built = std::make_shared<const Run>(
      grid_.RunTokens(i), std::vector<std::shared_ptr<HeldBlock>>(blocks.begin(), blocks.end()));
  absl::MutexLock lock(&mutex_);
  std::weak_ptr<const Run>& entry = runs_[key];
  if (std::shared_ptr<const Run> run = entry.lock()) return run;
  entry = built;
  built_.fetch_add(1, std::memory_order_relaxed);
  SweepExpired();
  return built;
}

uint64_t RunRegistry::live() const {
  absl::MutexLock lock(&mutex_);
  uint64_t live = 0;
  for (const auto& [key, run] : runs_) live += !run.expired();
  return live;
}

void RunRegistry::SweepExpired() {
  if (runs_.size() < sweep_at_) return;
  for (auto it = runs_.begin(); it != runs_.end();) {
    auto current = it++;
    if (current->second.expired()) runs_.erase(current);
  }
  sweep_at_ = std::max<size_t>(64, 2 * runs_.size());
}

}  // namespace quarry
