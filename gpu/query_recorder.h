// Queries of a running sequence, kept for a trace of it (gpu/trace_file.h).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/model_config.h"

namespace quarry {

struct QueryRecorderOptions {
  std::vector<uint32_t> layers;    // none: all
  uint32_t prompt_queries = 2048;  // of positions spread evenly over the prompt
  uint32_t last_queries = 64;      // and of the prompt's last positions
  uint32_t seed = 1;               // of the positions
};

// Of one sequence. Not thread-safe.
class QueryRecorder {
 public:
  // All query heads after RoPE, by rising position.
  struct Queries {
    std::vector<uint32_t> positions;
    std::vector<float> q;  // [positions][heads][head_dim]
  };
  struct Layer {
    Queries prompt;   // sampled
    Queries decoded;  // every one behind the prompt
  };

  // InvalidArgument names a layer that the model lacks; Unimplemented a sliding window, for a
  // trace's queries attend everything before them.
  static absl::StatusOr<QueryRecorder> Create(const ModelConfig& config,
                                              const QueryRecorderOptions& options);

  // Tokens that are about to run as a prompt's: chooses among them.
  void BeginPrompt(TokenRange prompt);
  // q of tokens [first, first + rows) of a layer, on the device. Tokens from `first` on that were
  // taken before were void, and are forgotten.
  absl::Status Take(uint32_t layer, uint32_t first, uint32_t rows, const float* q, Device& device);

  const std::map<uint32_t, Layer>& layers() const { return layers_; }

 private:
  QueryRecorder(const QueryRecorderOptions& options, size_t width)
      : options_(options), width_(width) {}
  void Forget(uint32_t first, Queries* queries) const;

  QueryRecorderOptions options_;
  size_t width_;  // heads x head_dim
  uint32_t prompt_end_ = 0;
  std::vector<uint32_t> chosen_;  // positions of the prompt, rising
  std::map<uint32_t, Layer> layers_;
};

}  // namespace quarry
