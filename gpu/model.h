// A model's weights on a device, ready to run.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/model_config.h"
#include "proto/model_spec.h"

namespace quarry {

// Matrices are [out][in] fp32, widened exactly from what is stored.
struct LayerWeights {
  DeviceBuffer attention_norm, mlp_norm;  // [hidden]
  DeviceBuffer q, k, v;                   // [heads * head_dim][hidden], [kv_heads * head_dim][hidden]
  DeviceBuffer o;                         // [hidden][heads * head_dim]
  DeviceBuffer gate_up;                   // [2 * intermediate][hidden], gate first
  DeviceBuffer down;                      // [hidden][intermediate]
};

class Model {
 public:
  // Errors name the file, the tensor, the shape it has and the one that is wanted.
  static absl::StatusOr<std::unique_ptr<Model>> Load(const std::string& directory, Device* device);

  const ModelConfig& config() const { return config_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const float* embedding() const { return embedding_.floats(); }  // [vocab][hidden]
  const float* head() const {                                      // [vocab][hidden]
    return config_.tied_head ? embedding_.floats() : head_.floats();
  }
  const float* final_norm() const { return final_norm_.floats(); }

  // Identity of a context of at most max_tokens tokens whose K and V are stored as kv_dtype.
  // Weights digest: SHA-256 over config.json and every weight file, each with its length first,
  // in the order of their names. Tokenizer digest: of tokenizer.model, tokenizer.json and
  // vocab.json where they are.
  absl::StatusOr<ModelSpec> SpecFor(uint32_t max_tokens, DType kv_dtype) const;

 private:
  Model() = default;

  ModelConfig config_;
  std::string name_;
  WeightsDigest weights_digest_;
  TokenizerDigest tokenizer_digest_;
  DeviceBuffer embedding_, head_, final_norm_;
  std::vector<LayerWeights> layers_;
};

}  // namespace quarry
