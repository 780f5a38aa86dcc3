#include "gpu/tokenizer.h"

#include <dlfcn.h>

#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/sentencepiece_module.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Loaded once, in a linker namespace of its own, and kept: its C library cannot be taken apart.
absl::StatusOr<const SentencePieceModule*> Module() {
  static const auto loaded = [] {
    const void* symbol = nullptr;
    void* const library = dlmopen(LM_ID_NEWLM, kSentencePieceFile, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) symbol = dlsym(library, kSentencePieceSymbol);
    const char* const error = symbol == nullptr ? dlerror() : nullptr;
    return std::pair(static_cast<const SentencePieceModule*>(symbol),
                     std::string(error == nullptr ? "" : error));
  }();
  if (loaded.first != nullptr) return loaded.first;
  return absl::UnavailableError(
      absl::StrCat("text needs ", kSentencePieceFile, ", give token ids: ", loaded.second));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  const std::string path = directory + "/tokenizer.model";
  if (!std::filesystem::exists(path)) {
    return absl::NotFoundError(
        absl::StrCat(directory, " has no tokenizer.model: give the prompt as token ids"));
  }
  QUARRY_ASSIGN_OR_RETURN(const SentencePieceModule* module, Module());
  const char* error = nullptr;
  void* const model = module->load(path.c_str(), &error);
  if (model == nullptr) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error));
  return std::unique_ptr<Tokenizer>(new Tokenizer(*module, model));
}

Tokenizer::~Tokenizer() { module_.destroy(model_); }

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text) const {
  const int* ids = nullptr;
  size_t count = 0;
  const char* const error = module_.encode(model_, text.data(), text.size(), &ids, &count);
  if (error != nullptr) return absl::InvalidArgumentError(error);
  std::vector<uint32_t> out;
  const int bos = module_.bos_id(model_);
  if (bos >= 0) out.push_back(static_cast<uint32_t>(bos));
  out.insert(out.end(), ids, ids + count);
  return out;
}

std::string Tokenizer::Decode(std::span<const uint32_t> tokens) const {
  const std::vector<int> ids(tokens.begin(), tokens.end());
  const char* text = nullptr;
  size_t bytes = 0;
  if (module_.decode(model_, ids.data(), ids.size(), &text, &bytes) != nullptr) return {};
  return std::string(text, bytes);
}

}  // namespace quarry
