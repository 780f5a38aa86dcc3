#include "daemon/run_indexes.h"

#include <algorithm>
#include <numeric>

namespace quarry {
namespace {

// To learn again costs a build: it is worth it with enough samples, and some times more of them or of
// the tokens than before.
constexpr uint32_t kLeastSamples = 32, kTimesMoreSamples = 2, kTimesMoreTokens = 4;

}  // namespace

bool RunIndexes::empty() const {
  absl::ReaderMutexLock lock(&mutex_);
  return std::all_of(heads_.begin(), heads_.end(), [](const Head& head) { return !head.index; });
}

bool RunIndexes::IsEmpty(uint32_t layer) const {
  const auto first = heads_.begin() + static_cast<ptrdiff_t>(At(layer, 0));
  return std::all_of(first, first + kv_heads_, [](const Head& head) { return !head.index; });
}

bool RunIndexes::Learning::OutdatedBy(const Learning& now) const {
  return now.renewal > renewal ||
         (now.samples >= kLeastSamples && now.samples / kTimesMoreSamples >= samples) ||
         (now.tokens / kTimesMoreTokens >= tokens && now.samples >= samples);
}

void RunIndexes::Learning::Limit(const Learning& other) {
  samples = std::min(samples, other.samples);
  tokens = std::min(tokens, other.tokens);
  renewal = std::min(renewal, other.renewal);
}

bool RunIndexes::all_learned() const {
  absl::ReaderMutexLock lock(&mutex_);
  return std::all_of(layers_.begin(), layers_.end(),
                     [](const Layer& layer) { return layer.learned.has_value(); });
}

uint64_t RunIndexes::changes() const {
  absl::ReaderMutexLock lock(&mutex_);
  return std::accumulate(layers_.begin(), layers_.end(), uint64_t{0},
                         [](uint64_t sum, const Layer& layer) { return sum + layer.changes; });
}

std::vector<uint32_t> RunIndexes::UnsavedLayers() const {
  std::vector<uint32_t> unsaved;
  absl::ReaderMutexLock lock(&mutex_);
  if (busy_layers_ > 0 || name_ == nullptr) return unsaved;
  for (uint32_t l = 0; l < layers_.size(); ++l) {
    if (layers_[l].changes != layers_[l].saved) unsaved.push_back(l);
  }
  return unsaved;
}

RunIndexes::Due RunIndexes::Begin(uint32_t number, const Learning& now, RunCounts* counts) {
  absl::MutexLock lock(&mutex_);
  Layer& layer = layers_[number];
  if (!layer.IsDue(now)) return Due::kNo;
  layer.busy = true;
  if (busy_layers_++ == 0) counts->busy.fetch_add(1, std::memory_order_relaxed);
  return layer.learned.has_value() ? Due::kAgain : Due::kFirst;
}

void RunIndexes::End(uint32_t number, Learning learned, bool all_heads, RunCounts* counts) {
  absl::MutexLock lock(&mutex_);
  Layer& layer = layers_[number];
  layer.busy = false;
  if (all_heads) {
    for (uint32_t h = 0; h < kv_heads_; ++h) {
      if (const auto& of_head = heads_[At(number, h)].learned; of_head.has_value())
        learned.Limit(*of_head);
    }
    if (layer.learned.has_value()) {
      // What was learned from other queries is not undone by fewer of the old ones, nor twice.
      learned.samples = std::max(learned.samples, layer.learned->samples);
      learned.renewal = std::max(learned.renewal, layer.learned->renewal);
      if (++layer.again > most_again_) {
        most_again_ = layer.again;
        counts->relearned.fetch_add(1, std::memory_order_relaxed);
      }
    }
    layer.learned = learned;
    ++layer.changes;
    layer.refused_bytes = 0;
  }
  // Release: who sees that none is busy sees what was learned.
  if (--busy_layers_ == 0) counts->busy.fetch_sub(1, std::memory_order_release);
}

}  // namespace quarry
