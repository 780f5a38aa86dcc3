#include "daemon/run_registry.h"

#include <algorithm>

#include "proto/check.h"

namespace quarry {

std::shared_ptr<const Run> RunRegistry::GetOrMake(
    uint32_t i, const KvShape& shape, std::span<const std::shared_ptr<HeldBlock>> blocks) {
  QUARRY_CHECK(!blocks.empty() && blocks.back()->published());
  const Key key{blocks.back()->id(), i, shape};
  absl::MutexLock lock(&mutex_);
  Entry& entry = runs_[key];
  entry.asked = ++asks_;
  if (std::shared_ptr<const Run> run = entry.run.lock()) return run;
  if (entry.indexes == nullptr) entry.indexes = std::make_shared<RunIndexes>(shape);
  auto made = std::make_shared<const Run>(
      grid_.RunTokens(i), std::vector<std::shared_ptr<HeldBlock>>(blocks.begin(), blocks.end()),
      entry.indexes);
  entry.run = made;
  made_.fetch_add(1, std::memory_order_relaxed);
  SweepExpired();  // `entry` may move
  return made;
}

bool RunRegistry::DropIdle() {
  std::shared_ptr<RunIndexes> dropped;  // ends outside the lock
  absl::MutexLock lock(&mutex_);
  auto oldest = runs_.end();
  for (auto it = runs_.begin(); it != runs_.end(); ++it) {
    if (!it->second.run.expired() || it->second.indexes->empty()) continue;
    if (oldest == runs_.end() || it->second.asked < oldest->second.asked) oldest = it;
  }
  if (oldest == runs_.end()) return false;
  dropped = std::move(oldest->second.indexes);
  runs_.erase(oldest);
  return true;
}

uint64_t RunRegistry::live() const {
  absl::MutexLock lock(&mutex_);
  uint64_t live = 0;
  for (const auto& [key, entry] : runs_) live += !entry.run.expired();
  return live;
}

uint64_t RunRegistry::indexed() const {
  absl::MutexLock lock(&mutex_);
  uint64_t indexed = 0;
  for (const auto& [key, entry] : runs_) {
    indexed += !entry.run.expired() && entry.indexes->learned().has_value();
  }
  return indexed;
}

void RunRegistry::SweepExpired() {
  if (runs_.size() < sweep_at_) return;
  for (auto it = runs_.begin(); it != runs_.end();) {
    auto current = it++;
    if (current->second.run.expired() && current->second.indexes->empty()) runs_.erase(current);
  }
  sweep_at_ = std::max<size_t>(64, 2 * runs_.size());
}

}  // namespace quarry
