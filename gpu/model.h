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

struct LayerWeights {
  DeviceMatrix attention_norm, mlp_norm;  // [1][hidden]
  DeviceMatrix q, k, v;  // [heads * head_dim][hidden], [kv_heads * head_dim][hidden]
  DeviceMatrix o;        // [hidden][heads * head_dim]
  DeviceMatrix gate_up;  // [2 * intermediate][hidden], gate first
  DeviceMatrix down;     // [hidden][intermediate]
};

class Model {
 public:
  // Errors name the tensor, the shape it has and the one that is wanted. A tensor that the
  // architecture does not have (a bias, an adapter) is refused: leaving it out would be wrong.
  static absl::StatusOr<std::unique_ptr<Model>> Load(const std::string& directory, Device* device);

  const ModelConfig& config() const { return config_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const DeviceMatrix& embedding() const { return embedding_; }  // [vocab][hidden]
  const DeviceMatrix& head() const { return config_.tied_head ? embedding_ : head_; }
  const DeviceMatrix& final_norm() const { return final_norm_; }  // [1][hidden]

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
  DeviceMatrix embedding_, head_, final_norm_;
  std::vector<LayerWeights> layers_;
};

}  // namespace quarry
