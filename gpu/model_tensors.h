// The tensors of a model's files as the matrices that the worker computes with.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/model_config.h"
#include "gpu/safetensors.h"
#include "gpu/weights/weight_store.h"

namespace quarry {

struct LayerWeights {
  DeviceMatrix attention_norm, mlp_norm;  // [1][hidden]
  DeviceMatrix q, k, v;  // [heads * head_dim][hidden], [kv_heads * head_dim][hidden]
  DeviceMatrix o;        // [hidden][heads * head_dim]
  DeviceMatrix gate_up;  // [2 * intermediate][hidden], gate first
  DeviceMatrix down;     // [hidden][intermediate]
};

// Borrowed from the files.
struct ModelTensors {
  std::vector<StoredUnit> layers;
  StoredMatrix embedding;   // [vocab][hidden]
  StoredMatrix head;        // the same; empty where it is the embedding
  StoredMatrix final_norm;  // [1][hidden]
};

// `form` is that of the layers' matrices; norms, embedding and head are plain. Errors name the
// tensor, the shape it has and the one that is wanted. A tensor that the architecture does not have
// (a bias, an adapter) is refused: leaving it out would be wrong.
absl::StatusOr<ModelTensors> FindTensors(const ModelConfig& config, const WeightFiles& files,
                                         WeightForm form);

// A layer's matrices, in the order of its unit.
LayerWeights LayerOf(std::vector<DeviceMatrix> unit);

}  // namespace quarry
