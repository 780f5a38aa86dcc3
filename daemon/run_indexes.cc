#include "daemon/run_indexes.h"

#include <algorithm>

namespace quarry {
namespace {

// To learn again costs a build: it is worth it with enough samples, and several times more than
// before.
constexpr uint32_t kLeastSamples = 32, kTimesMore = 4;

}  // namespace

bool RunIndexes::empty() const {
  absl::ReaderMutexLock lock(&mutex_);
  return std::all_of(heads_.begin(), heads_.end(), [](const auto& head) { return !head; });
}

RunIndexes::Due RunIndexes::Begin(uint32_t samples, Why why) {
  absl::MutexLock lock(&mutex_);
  if (busy_) return Due::kNo;
  if (learned_from_.has_value() && why == Why::kMoreSamples &&
      (samples < kLeastSamples || samples / kTimesMore < *learned_from_)) {
    return Due::kNo;
  }
  busy_ = true;
  // What was learned from other queries is not undone by fewer of the old ones.
  learning_from_ = std::max(samples, learned_from_.value_or(0));
  return learned_from_.has_value() ? Due::kAgain : Due::kFirst;
}

void RunIndexes::End(bool done) {
  absl::MutexLock lock(&mutex_);
  busy_ = false;
  if (done) learned_from_ = learning_from_;
}

}  // namespace quarry
