#include "daemon/index_memory.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace quarry {

absl::StatusOr<std::shared_ptr<const KeyIndex>> IndexMemory::Keep(MadeIndex* made) {
  const void* const shared = made->shared.get();
  {
    absl::MutexLock lock(&mutex_);
    const uint64_t bytes = LockedBytesOf(*made);
    if (bytes > max_bytes_ || used_ > max_bytes_ - bytes) {
      return absl::ResourceExhaustedError(absl::StrCat("indexes of ", used_,
                                                       " bytes and this one of ", bytes,
                                                       " pass index.max_bytes ", max_bytes_));
    }
    used_ += bytes;
    if (shared != nullptr) ++sharers_[shared];
  }
  // What is shared ends behind the count of it: until then nothing else has its address.
  return std::shared_ptr<const KeyIndex>(
      made->index.release(),
      [memory = shared_from_this(), bytes = made->bytes, of_all = std::move(made->shared),
       of_all_bytes = made->shared_bytes](const KeyIndex* index) {
        delete index;
        memory->Free(bytes, of_all.get(), of_all_bytes);
      });
}

void IndexMemory::Free(uint64_t bytes, const void* shared, uint64_t shared_bytes) {
  absl::MutexLock lock(&mutex_);
  used_ -= bytes;
  if (shared == nullptr) return;
  const auto sharers = sharers_.find(shared);
  if (--sharers->second > 0) return;
  sharers_.erase(sharers);
  used_ -= shared_bytes;
}

uint64_t IndexMemory::LockedBytesOf(const MadeIndex& made) const {
  const bool first = made.shared != nullptr && !sharers_.contains(made.shared.get());
  return made.bytes + (first ? made.shared_bytes : 0);
}

uint64_t IndexMemory::BytesOf(const MadeIndex& made) const {
  absl::MutexLock lock(&mutex_);
  return LockedBytesOf(made);
}

uint64_t IndexMemory::used() const {
  absl::MutexLock lock(&mutex_);
  return used_;
}

}  // namespace quarry
