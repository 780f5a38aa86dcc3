#include "daemon/run_registry.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "proto/check.h"

namespace quarry {

bool Run::stands() const {
  return std::all_of(blocks_.begin(), blocks_.end(), [](const auto& b) { return b->stands(); });
}

std::shared_ptr<const Run> RunRegistry::GetOrMake(
    std::string_view tenant, uint32_t i, const KvShape& shape,
    std::span<const std::shared_ptr<HeldBlock>> blocks, std::shared_ptr<const Run> open) {
  for (;;) {
    std::shared_ptr<const Run> run = Register(tenant, i, shape, blocks, open);
    // Another's run of bytes that are gone gives way to one of the caller's.
    if (!ForgetIfGone(*run) || std::ranges::equal(run->blocks(), blocks)) return run;
  }
}

std::shared_ptr<const Run> RunRegistry::Register(std::string_view tenant, uint32_t i,
                                                 const KvShape& shape,
                                                 std::span<const std::shared_ptr<HeldBlock>> blocks,
                                                 std::shared_ptr<const Run> open) {
  QUARRY_CHECK(!blocks.empty() && blocks.back()->published());
  const Key key{blocks.back()->id(), i, shape};
  absl::MutexLock lock(&mutex_);
  Entry& entry = runs_[key];
  if (open != nullptr && !std::ranges::equal(open->blocks(), blocks)) open = nullptr;
  if (entry.indexes == nullptr) {
    entry.indexes = open != nullptr ? open->indexes() : std::make_shared<RunIndexes>(shape);
    entry.tenant = tenant;
    const NamespaceDigest& name_space = blocks.back()->origin().name_space;
    if (std::ranges::all_of(blocks, [&](const std::shared_ptr<HeldBlock>& block) {
          return block->origin().name_space == name_space;
        })) {
      entry.indexes->SetName({entry.tenant, key.last_block, name_space, grid_.RunTokens(i), shape});
    }
  }
  std::shared_ptr<const Run> run = Use(i, blocks, std::move(open), &entry);
  SweepExpired();  // `entry` may move
  return run;
}

std::shared_ptr<const Run> RunRegistry::Use(uint32_t i,
                                            std::span<const std::shared_ptr<HeldBlock>> blocks,
                                            std::shared_ptr<const Run> open, Entry* entry) {
  entry->asked = ++asks_;
  std::shared_ptr<const Run> run = entry->run.lock();
  if (run != nullptr) return run;
  const bool takes = open != nullptr && open->indexes() == entry->indexes;
  run = takes ? std::move(open) : Make(i, blocks, entry->indexes);
  entry->run = run;
  entry->earlier = std::exchange(entry->sources, {});
  for (const auto& block : blocks) {
    entry->sources.push_back({block->id(), block->handle(), block->origin().name_space});
  }
  run->registered_.store(true, std::memory_order_relaxed);
  made_.fetch_add(1, std::memory_order_relaxed);
  return run;
}

std::shared_ptr<const Run> RunRegistry::FindIndexed(
    uint32_t i, const KvShape& shape, std::span<const std::shared_ptr<HeldBlock>> blocks) {
  std::shared_ptr<const Run> run;
  {
    absl::MutexLock lock(&mutex_);
    const auto known = runs_.find(Key{blocks.back()->id(), i, shape});
    if (known == runs_.end()) return nullptr;
    Entry& entry = known->second;
    if (entry.run.expired() && entry.indexes->empty()) return nullptr;
    run = Use(i, blocks, nullptr, &entry);
  }
  return ForgetIfGone(*run) ? nullptr : run;
}

bool RunRegistry::ForgetIfGone(const Run& run) {
  if (run.stands()) return false;
  ForgetIf([&](const Entry& entry) { return entry.indexes == run.indexes(); });
  return true;
}

std::shared_ptr<const Run> RunRegistry::Open(uint32_t i, const KvShape& shape,
                                             std::span<const std::shared_ptr<HeldBlock>> blocks,
                                             const BlockId& last_block) {
  {
    absl::MutexLock lock(&mutex_);
    const auto known = runs_.find(Key{last_block, i, shape});
    if (known != runs_.end()) {
      known->second.asked = ++asks_;
      return nullptr;
    }
  }
  return Make(i, blocks, std::make_shared<RunIndexes>(shape));
}

std::shared_ptr<const Run> RunRegistry::Make(uint32_t i,
                                             std::span<const std::shared_ptr<HeldBlock>> blocks,
                                             std::shared_ptr<RunIndexes> indexes) const {
  return Run::Make(grid_.RunTokens(i),
                   std::vector<std::shared_ptr<HeldBlock>>(blocks.begin(), blocks.end()),
                   std::move(indexes));
}

std::vector<std::shared_ptr<RunIndexes>> RunRegistry::Registered() const {
  std::vector<std::shared_ptr<RunIndexes>> registered;
  absl::MutexLock lock(&mutex_);
  for (const auto& [key, entry] : runs_) registered.push_back(entry.indexes);
  return registered;
}

bool RunRegistry::Knows(const RunIndexes& indexes) const {
  const std::shared_ptr<const RunName> name = indexes.name();
  if (name == nullptr) return false;
  absl::MutexLock lock(&mutex_);
  const auto known = runs_.find(Key{name->last_block, grid_.RunAt(name->tokens.lo), name->shape});
  return known != runs_.end() && known->second.indexes.get() == &indexes;
}

uint64_t RunRegistry::LockedIdleBytes() const {
  uint64_t bytes = 0;
  for (const auto& [key, entry] : runs_) bytes += entry.idle() ? entry.indexes->bytes() : 0;
  return bytes;
}

uint64_t RunRegistry::idle_bytes() const {
  absl::MutexLock lock(&mutex_);
  return LockedIdleBytes();
}

bool RunRegistry::DropIdle(uint64_t bytes) {
  std::shared_ptr<RunIndexes> dropped;  // ends outside the lock
  absl::MutexLock lock(&mutex_);
  if (LockedIdleBytes() < bytes) return false;
  auto oldest = runs_.end();
  for (auto it = runs_.begin(); it != runs_.end(); ++it) {
    if (!it->second.idle()) continue;
    if (oldest == runs_.end() || it->second.asked < oldest->second.asked) oldest = it;
  }
  if (oldest == runs_.end()) return false;
  dropped = std::move(oldest->second.indexes);
  runs_.erase(oldest);
  return true;
}

template <typename Predicate>
void RunRegistry::ForgetIf(Predicate predicate) {
  std::vector<std::shared_ptr<RunIndexes>> dropped;  // end outside the lock
  absl::MutexLock lock(&mutex_);
  for (auto it = runs_.begin(); it != runs_.end();) {
    const auto current = it++;
    if (!predicate(current->second)) continue;
    dropped.push_back(std::move(current->second.indexes));
    runs_.erase(current);
  }
}

void RunRegistry::Purge(std::string_view tenant, const std::optional<NamespaceDigest>& name_space,
                        std::span<const BlockId> blocks) {
  const absl::flat_hash_set<BlockId> named(blocks.begin(), blocks.end());
  ForgetIf([&](const Entry& entry) {
    if (entry.tenant != tenant) return false;
    return std::any_of(entry.sources.begin(), entry.sources.end(), [&](const Source& source) {
      if (!named.empty()) return named.contains(source.block);
      return !name_space.has_value() || source.name_space == *name_space;
    });
  });
}

void RunRegistry::Forget(BlockHandle broken) {
  ForgetIf([&](const Entry& entry) {
    const auto is_broken = [&](const Source& source) { return source.handle == broken; };
    return std::any_of(entry.sources.begin(), entry.sources.end(), is_broken) ||
           std::any_of(entry.earlier.begin(), entry.earlier.end(), is_broken);
  });
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
    indexed += !entry.run.expired() && entry.indexes->all_learned();
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
