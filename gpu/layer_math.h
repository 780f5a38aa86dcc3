// A model's layers on a device, without attention: what surrounds it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/model.h"
#include "proto/model_spec.h"

namespace quarry {

// Device memory for the tokens in work; its size is that of one chunk, whatever the context's.
struct LayerScratch {
  uint32_t max_rows = 0;
  DeviceBuffer norm;                // [rows][hidden]
  DeviceBuffer q, o;                // [rows][heads][head_dim]
  DeviceBuffer lse;                 // [rows][heads]
  DeviceBuffer k_wide, v_wide;      // [rows][kv_heads][head_dim], fp32
  DeviceBuffer k, v;                // the same in the context's dtype
  DeviceBuffer far_o, far_lse;      // the daemon's answers, as o and lse; only if asked for
  DeviceBuffer gate_up, activated;  // [some rows][2 * intermediate], [some rows][intermediate]
};

// Bytes of a scratch with room for the daemon's answers.
uint64_t LayerScratchBytes(const ModelConfig& config, const KvShape& shape, uint32_t max_rows);

// Consecutive tokens of one sequence, in the next rows of what is in work.
struct TokenRows {
  uint32_t first = 0, rows = 0;
  const RopeSpec* rope = nullptr;      // null: that of the math
  const DevicePlace* place = nullptr;  // not null: says on the device what `first` is
};

// What comes of the logits after a token.
struct Prediction {
  std::vector<float> logits;  // where none was drawn
  uint32_t token = 0;         // that was
};

// Not thread-safe. Model and device outlive it.
class LayerMath {
 public:
  // Which attention the scratch is for: with answers from the daemon or without.
  enum class Answers { kNone, kFar };

  LayerMath(const Model& model, Device& device, const KvShape& shape, const RopeSpec& rope)
      : model_(model), device_(device), shape_(shape), rope_(rope) {}

  absl::StatusOr<LayerScratch> Allocate(uint32_t max_rows, Answers answers) const;

  // q, k and v of the tokens from their hidden states x [rows][hidden]. k and v are rounded to the
  // context's dtype before anybody attends them, so that local attention and the daemon's see the
  // same.
  void Project(uint32_t layer, const float* x, std::span<const TokenRows> tokens, LayerScratch* s);
  // Of tokens [first, first + rows).
  void Project(uint32_t layer, const float* x, uint32_t first, uint32_t rows, LayerScratch* s) {
    const TokenRows tokens{first, rows};
    Project(layer, x, {&tokens, 1}, s);
  }
  // Adds the output projection of s->o, then the MLP, to x.
  void Finish(uint32_t layer, float* x, uint32_t rows, LayerScratch* s);
  // Of some tokens' hidden states x [rows][hidden]; norm [rows][hidden] is working memory, logits
  // has room for [rows][vocab], for Predict.
  void Head(const float* x, uint32_t rows, float* norm, float* logits);
  // After each of `tokens`, whose numbers name them in errors: the logits, or, with a draw for
  // each, the next token, chosen by the device. Waits for it. Internal if logits are not finite,
  // for no token is to be chosen from such.
  absl::StatusOr<std::vector<Prediction>> Predict(const float* logits,
                                                  std::span<const uint32_t> tokens,
                                                  std::span<const TokenDraw> draws);
  // Head and Predict, with memory of their own.
  absl::StatusOr<std::vector<Prediction>> PredictFrom(const float* x,
                                                      std::span<const uint32_t> tokens,
                                                      std::span<const TokenDraw> draws);

  // What attention of tokens [first, first + rows) needs to know beside its parts; they are the
  // scratch's rows from `at` on.
  DeviceAttention Attention(uint32_t first, uint32_t rows, std::span<const DeviceKv> parts,
                            const LayerScratch& s, uint32_t at = 0) const;

 private:
  absl::StatusOr<std::vector<Prediction>> ReadLogits(DeviceLogits logits,
                                                     std::span<const uint32_t> tokens);

  const Model& model_;
  Device& device_;
  const KvShape shape_;
  const RopeSpec rope_;
};

}  // namespace quarry
