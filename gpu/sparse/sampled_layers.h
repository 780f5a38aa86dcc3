// The layers of a model on a reference text: K, V and every query, for the offline search.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "gpu/device.h"
#include "gpu/model.h"
#include "gpu/sparse/build_index.h"

namespace quarry {

struct SampledLayer {
  uint32_t layer = 0;
  LayerKv kv;                // as the worker stores them, keys after RoPE
  std::span<const float> q;  // [tokens][heads][head_dim], after RoPE
};

// Runs the model, densely, and hands each layer to `take` in order; what it is given is valid until
// it returns. An error of `take` ends the run and is returned. max_tokens pins the rope regime.
// The queries of `layers_at_a_time` layers are in memory, and the model runs once for every so
// many: 4 bytes x tokens x heads x head_dim a layer. Errors as of Sequence and QueryRecorder.
struct SampleRun {
  std::span<const uint32_t> tokens;
  uint32_t max_tokens = 0;
  uint32_t layers_at_a_time = 0;  // 0: all
};
absl::Status SampleLayers(const Model& model, Device& device, const SampleRun& run,
                          const std::function<absl::Status(const SampledLayer&)>& take);

// A text that is made from a seed alone: random ids, with stretches that come again, so that heads
// that copy have something to find. No text of the kind that the model was trained on.
std::vector<uint32_t> MadeTokens(uint32_t tokens, uint32_t vocab, uint64_t seed);

}  // namespace quarry
