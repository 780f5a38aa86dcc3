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

RunIndexes::Due RunIndexes::Begin(const Learning& now, Why why) {
  absl::MutexLock lock(&mutex_);
  if (busy_) return Due::kNo;
  if (!learned_.has_value()) {
    busy_ = true;
    return Due::kFirst;
  }
  const bool samples =
      now.samples >= kLeastSamples && now.samples / kTimesMoreSamples >= learned_->samples;
  const bool tokens =
      now.tokens / kTimesMoreTokens >= learned_->tokens && now.samples >= learned_->samples;
  if (why == Why::kMoreSamples && !samples && !tokens) return Due::kNo;
  busy_ = true;
  return Due::kAgain;
}

void RunIndexes::End(std::optional<Learning> learned) {
  absl::MutexLock lock(&mutex_);
  busy_ = false;
  if (!learned.has_value()) return;
  // What was learned from other queries is not undone by fewer of the old ones.
  if (learned_.has_value()) learned->samples = std::max(learned->samples, learned_->samples);
  learned_ = learned;
}

}  // namespace quarry
