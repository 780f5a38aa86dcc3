#include "daemon/run_indexes.h"

#include <algorithm>

namespace quarry {
namespace {

// To learn again costs a build: it is worth it with enough samples, and some times more of them or of
// the tokens than before.
constexpr uint32_t kLeastSamples = 32, kTimesMoreSamples = 2, kTimesMoreTokens = 4;

}  // namespace

bool RunIndexes::empty() const {
  absl::ReaderMutexLock lock(&mutex_);
  return std::all_of(heads_.begin(), heads_.end(), [](const auto& head) { return !head; });
}

bool RunIndexes::Learning::OutdatedBy(const Learning& now) const {
  return now.renewal > renewal ||
         (now.samples >= kLeastSamples && now.samples / kTimesMoreSamples >= samples) ||
         (now.tokens / kTimesMoreTokens >= tokens && now.samples >= samples);
}

RunIndexes::Due RunIndexes::Begin(const Learning& now) {
  absl::MutexLock lock(&mutex_);
  if (busy_ || (learned_.has_value() && !learned_->OutdatedBy(now))) return Due::kNo;
  busy_ = true;
  return learned_.has_value() ? Due::kAgain : Due::kFirst;
}

void RunIndexes::End(std::optional<Learning> learned) {
  absl::MutexLock lock(&mutex_);
  busy_ = false;
  if (!learned.has_value()) return;
  if (learned_.has_value()) {
    // What was learned from other queries is not undone by fewer of the old ones, nor twice.
    learned->samples = std::max(learned->samples, learned_->samples);
    learned->renewal = std::max(learned->renewal, learned_->renewal);
  }
  learned_ = learned;
}

}  // namespace quarry
