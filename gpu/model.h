// A model's weights on a device, ready to run.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/model_config.h"
#include "gpu/model_tensors.h"
#include "gpu/safetensors.h"
#include "gpu/weights/residence.h"
#include "gpu/weights/weight_store.h"
#include "proto/model_spec.h"

namespace quarry {

struct WeightOptions {
  WeightMode mode = WeightMode::kAuto;
  // Of the layers' matrices; norms, embedding and head stay plain.
  WeightForm form = WeightForm::kPlain;
  // What kAuto leaves of the device's budget to activations and K/V (gpu/working_bytes.h).
  uint64_t reserve_bytes = 0;
  // What streamed weights of kAuto leave free of it while they stay in room that nobody wants.
  uint64_t leave_free_bytes = 0;
};

// Rows [first, first + weight.rows) of the output head.
struct HeadTile {
  uint32_t first = 0;
  DeviceMatrix weight;  // [rows][hidden]
  size_t unit = 0;      // of the model's store
};

// Used by the device's thread; the device outlives it.
class Model {
 public:
  // Errors are those of FindTensors and PlanResidence. Where not all weights stay on the device,
  // the embedding table does not, and its rows come from the files, which stay mapped.
  static absl::StatusOr<std::unique_ptr<Model>> Load(const std::string& directory, Device* device,
                                                     const WeightOptions& options = {});

  const ModelConfig& config() const { return config_; }
  // For operations that are called before another layer or tile is asked for: it may take the place
  // of this one. Cheapest in the order of the layers, then the head's tiles.
  const LayerWeights& Layer(uint32_t layer) const;
  const HeadTile& Head(size_t tile) const;
  // No layer or tile is in use any more: all weights may make room.
  void UseNone() const { store_->UseNone(); }
  uint64_t weight_moves() const { return store_->moves(); }  // WeightStore::moves
  size_t head_tiles() const { return head_.size(); }
  // Rows of each; the last one may have fewer.
  uint32_t head_tile_rows() const { return static_cast<uint32_t>(head_.front().weight.rows); }
  const DeviceMatrix& final_norm() const { return final_norm_; }  // [1][hidden]
  // y[r] = embedding[tokens[r]], [tokens][hidden] on the device.
  absl::Status Embed(std::span<const uint32_t> tokens, float* y) const;
  const Residence& residence() const { return store_->residence(); }
  // Of the streamed bytes, those that stay on the device at present.
  uint64_t spare_weight_bytes() const { return store_->spare_bytes(); }

  // Identity of a context of at most max_tokens tokens whose K and V are stored as kv_dtype.
  // Weights digest: SHA-256 over config.json and every weight file, each with its length first,
  // in the order of their names. Tokenizer digest: of tokenizer.model, tokenizer.json and
  // vocab.json where they are. Codes in place of weights are other weights.
  absl::StatusOr<ModelSpec> SpecFor(uint32_t max_tokens, DType kv_dtype) const;

 private:
  explicit Model(Device* device) : device_(device) {}
  absl::Status Place(ModelTensors tensors, const WeightOptions& options);
  // Whether a unit that is used is somewhere else than when this was last asked.
  bool TakeMove(size_t unit) const;

  Device* const device_;
  ModelConfig config_;
  std::string name_;
  WeightsDigest weights_digest_;
  TokenizerDigest tokenizer_digest_;
  // All but the final norm are the store's.
  std::unique_ptr<WeightStore> store_;
  // What is borrowed of a unit follows where it is: by unit, and at_ has where it was.
  mutable std::vector<LayerWeights> layers_;
  mutable std::vector<HeadTile> head_;
  mutable std::vector<const std::byte*> at_;
  DeviceMatrix embedding_, final_norm_;
  bool table_on_device_ = true;
  WeightFiles files_;  // of a table that is not on the device
  HostMatrix table_;
};

}  // namespace quarry
