#include "daemon/index_room.h"

#include <algorithm>

namespace quarry {
namespace {

void Follow(double seen, double* mean) { *mean += *mean == 0 ? seen : (seen - *mean) / 16; }

}  // namespace

IndexRoom::IndexRoom(uint64_t max_bytes, RunRegistry* runs)
    : runs_(runs), memory_(std::make_shared<IndexMemory>(max_bytes)) {}

uint64_t IndexRoom::UpTo(uint64_t bytes) const {
  const uint64_t free = memory_->free();
  return bytes <= free ? bytes : std::min(bytes, free + runs_->idle_bytes());
}

uint64_t IndexRoom::BytesFor(uint32_t layer, const KvShape& shape, const Run& run,
                             bool first) const {
  if (const uint64_t refused = run.indexes()->refused_bytes(layer); refused > 0) return refused;
  absl::MutexLock lock(&mutex_);
  const auto size = sizes_.find(shape.head_dim);
  if (size == sizes_.end()) return 0;
  const double guess =
      size->second.per_token * run.tokens().size() + (first ? size->second.shared : 0);
  return static_cast<uint64_t>(std::min(guess, static_cast<double>(memory_->max_bytes())));
}

void IndexRoom::NoteSize(const KvShape& shape, const Run& run, const MadeIndex& made) {
  absl::MutexLock lock(&mutex_);
  Size& size = sizes_[shape.head_dim];
  Follow(static_cast<double>(made.bytes) / run.tokens().size(), &size.per_token);
  Follow(static_cast<double>(made.shared_bytes), &size.shared);
}

absl::StatusOr<std::shared_ptr<const KeyIndex>> IndexRoom::Keep(uint32_t layer,
                                                                const KvShape& shape,
                                                                const Run& run, MadeIndex* made) {
  NoteSize(shape, run, *made);
  for (;;) {
    absl::StatusOr<std::shared_ptr<const KeyIndex>> kept = memory_->Keep(made);
    if (kept.ok()) return kept;
    const uint64_t bytes = memory_->BytesOf(*made), free = memory_->free();
    if (bytes > free && !runs_->DropIdle(bytes - free)) {
      run.indexes()->SetRefusedBytes(layer, bytes);
      return kept;
    }
  }
}

}  // namespace quarry
