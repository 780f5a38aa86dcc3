// Text to token ids and back, where the model's folder has a SentencePiece tokenizer.model.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/sentencepiece_model.h"

namespace quarry {

class Tokenizer {
 public:
  // NotFound: the folder has no tokenizer.model; its prompts are given as token ids.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& directory);

  // With the tokenizer's beginning-of-sequence id first, if it has one.
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view text) const;
  std::string Decode(std::span<const uint32_t> tokens) const;

 private:
  Tokenizer() = default;
  SentencePieceModel model_;
};

}  // namespace quarry
