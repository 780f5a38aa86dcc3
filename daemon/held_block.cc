#include "daemon/held_block.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace quarry {

HeldBlock::HeldBlock(BlockStore& store, const BlockView& view, const BlockOrigin& origin)
    : store_(store),
      handle_(view.handle),
      memory_(view.memory),
      paged_(view.paged),
      origin_(origin) {
  if (view.state == BlockState::kPublished) {
    id_ = view.id;
    digest_ = view.digest;
    published_.store(true, std::memory_order_release);
  }
}

HeldBlock::~HeldBlock() { store_.Release(handle_); }

absl::StatusOr<std::shared_ptr<HeldBlock>> HeldBlock::Publish(const BlockKey& key,
                                                              std::optional<ByteDigest> digest) {
  QUARRY_CHECK(origin_.publishable);
  absl::MutexLock lock(&mutex_);
  const HeldBlock* outcome = winner_ != nullptr ? winner_.get() : published() ? this : nullptr;
  if (outcome != nullptr) {
    // A fork knows other token ids for tokens it shares than the context that published them.
    if (outcome->id_ != key.id) {
      return absl::FailedPreconditionError(
          absl::StrCat("block is published as ", outcome->id_.Hex(), ", not as ", key.id.Hex()));
    }
    return winner_;
  }
  bool existed = false;
  absl::StatusOr<BlockView> view = store_.Publish(handle_, key, digest, &existed);
  if (!view.ok()) return view.status();
  if (existed) {
    winner_ = std::make_shared<HeldBlock>(store_, *view, origin_);
    return winner_;
  }
  id_ = view->id;
  digest_ = view->digest;
  // Its digest was computed over these very bytes.
  verified_.store(true, std::memory_order_relaxed);
  published_.store(true, std::memory_order_release);
  return std::shared_ptr<HeldBlock>();
}

absl::Status HeldBlock::Verify() {
  if (!published() || paged_ != nullptr || verified_.load(std::memory_order_acquire)) {
    return absl::OkStatus();
  }
  const absl::Status status = store_.CopyOut(handle_, 0, {});
  if (status.ok()) verified_.store(true, std::memory_order_release);
  return status;
}

void HeldBlock::CopyFromMemory(std::span<const WantedBytes> wanted) const {
  for (const WantedBytes& one : wanted) {
    std::memcpy(one.out.data(), data() + one.offset, one.out.size());
  }
}

absl::Status HeldBlock::Copy(std::span<const WantedBytes> wanted) const {
  if (paged_ != nullptr) return paged_->Copy(wanted);
  CopyFromMemory(wanted);
  return absl::OkStatus();
}

absl::Status HeldBlock::CopyOnce(std::span<const WantedBytes> wanted) const {
  if (paged_ != nullptr) return paged_->CopyOnce(wanted);
  CopyFromMemory(wanted);
  return absl::OkStatus();
}

}  // namespace quarry
