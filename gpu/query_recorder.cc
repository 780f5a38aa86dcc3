#include "gpu/query_recorder.h"

#include <algorithm>
#include <random>
#include <span>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {

absl::StatusOr<QueryRecorder> QueryRecorder::Create(const ModelConfig& config,
                                                    const QueryRecorderOptions& options) {
  if (config.sliding_window != 0 && config.sliding_window < config.max_tokens) {
    return absl::UnimplementedError(
        absl::StrCat("a token of this model sees ", config.sliding_window,
                     " tokens; queries of a trace attend everything before them"));
  }
  QueryRecorder out(options, size_t{config.heads} * config.head_dim);
  for (uint32_t layer : options.layers) {
    if (layer >= config.layers) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, " of a model with ", config.layers, " layers"));
    }
    out.layers_[layer];
  }
  for (uint32_t l = 0; options.layers.empty() && l < config.layers; ++l) out.layers_[l];
  return out;
}

void QueryRecorder::BeginPrompt(TokenRange prompt) {
  prompt_end_ = prompt.hi;
  const uint32_t last = std::min(options_.last_queries, prompt.size());
  const uint32_t spread = prompt.size() - last;
  const uint32_t count = std::min(options_.prompt_queries, spread);
  std::mt19937 random(options_.seed);
  // One of each of `count` equal stretches.
  for (uint32_t i = 0; i < count; ++i) {
    const auto lo = static_cast<uint32_t>(uint64_t{spread} * i / count);
    const auto hi = static_cast<uint32_t>(uint64_t{spread} * (i + 1) / count);
    chosen_.push_back(prompt.lo + lo + random() % (hi - lo));
  }
  for (uint32_t i = 0; i < last; ++i) chosen_.push_back(prompt.hi - last + i);
}

void QueryRecorder::Forget(uint32_t first, Queries* queries) const {
  auto& positions = queries->positions;
  positions.erase(std::lower_bound(positions.begin(), positions.end(), first), positions.end());
  queries->q.resize(positions.size() * width_);
}

absl::Status QueryRecorder::Take(uint32_t layer, uint32_t first, uint32_t rows, const float* q,
                                 Device& device) {
  const auto found = layers_.find(layer);
  if (found == layers_.end()) return absl::OkStatus();
  Forget(first, &found->second.prompt);
  Forget(first, &found->second.decoded);
  const auto take = [&](uint32_t position, Queries* to) {
    to->positions.push_back(position);
    to->q.resize(to->q.size() + width_);
    return device.Download(std::as_writable_bytes(std::span(to->q).last(width_)),
                           q + (position - first) * width_);
  };
  const uint32_t end = first + rows;
  for (auto at = std::lower_bound(chosen_.begin(), chosen_.end(), first);
       at != chosen_.end() && *at < end; ++at) {
    QUARRY_RETURN_IF_ERROR(take(*at, &found->second.prompt));
  }
  for (uint32_t p = std::max(first, prompt_end_); p < end; ++p) {
    QUARRY_RETURN_IF_ERROR(take(p, &found->second.decoded));
  }
  return absl::OkStatus();
}

}  // namespace quarry
