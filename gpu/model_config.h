// A model's shape and rotary embedding, from its Hugging Face config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/rope.h"
#include "proto/model_spec.h"

namespace quarry {

enum class ModelFamily { kLlama, kPhi3 };

struct ModelConfig {
  ModelFamily family = ModelFamily::kLlama;
  uint32_t vocab = 0, hidden = 0, intermediate = 0, layers = 0;
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;
  uint32_t max_tokens = 0;      // max_position_embeddings
  uint32_t sliding_window = 0;  // a token sees itself and window - 1 before it; 0: all
  float norm_eps = 1e-5f;
  bool tied_head = false;
  DType dtype = DType::kBf16;  // of the stored weights
  RopeConfig rope;
  std::vector<uint32_t> end_tokens;  // that end a generation; from generation_config.json too
};

// InvalidArgument names the file, the key and the value; Unimplemented names an architecture,
// rope type, activation, bias or quantisation that this worker does not run.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory);

// The rotary embedding of a context of at most max_tokens tokens: LongRoPE's regime is pinned by
// it (long iff max_tokens > original_max_tokens). FailedPrecondition beyond the model's own
// maximum.
absl::StatusOr<RopeSpec> RopeFor(const ModelConfig& config, uint32_t max_tokens);

}  // namespace quarry
