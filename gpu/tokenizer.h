// Text to token ids and back, where the model's folder has a SentencePiece tokenizer.model.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace quarry {

struct SentencePieceModule;

// One thread at a time.
class Tokenizer {
 public:
  // NotFound: the folder has no tokenizer.model; its prompts are given as token ids.
  // InvalidArgument: the file is damaged. Unavailable: SentencePiece cannot be loaded here.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& directory);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // With the tokenizer's beginning-of-sequence id first, if it has one.
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view text) const;
  // Ids that the tokenizer does not have are shown as its unknown symbol.
  std::string Decode(std::span<const uint32_t> tokens) const;

 private:
  Tokenizer(const SentencePieceModule& module, void* model) : module_(module), model_(model) {}

  const SentencePieceModule& module_;
  void* const model_;
};

}  // namespace quarry
