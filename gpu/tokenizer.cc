#include "gpu/tokenizer.h"

#include <filesystem>

#include "absl/strings/str_cat.h"

namespace quarry {

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  const std::string path = directory + "/tokenizer.model";
  if (!std::filesystem::exists(path)) {
    return absl::NotFoundError(
        absl::StrCat(directory, " has no tokenizer.model: give the prompt as token ids"));
  }
  auto tokenizer = std::unique_ptr<Tokenizer>(new Tokenizer);
  const std::string error = tokenizer->model_.Load(path);
  if (!error.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error));
  return tokenizer;
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text) const {
  std::vector<int> ids;
  const std::string error = model_.Encode(std::string(text), &ids);
  if (!error.empty()) return absl::InvalidArgumentError(error);
  std::vector<uint32_t> out;
  if (model_.bos_id() >= 0) out.push_back(static_cast<uint32_t>(model_.bos_id()));
  out.insert(out.end(), ids.begin(), ids.end());
  return out;
}

std::string Tokenizer::Decode(std::span<const uint32_t> tokens) const {
  return model_.Decode(std::vector<int>(tokens.begin(), tokens.end()));
}

}  // namespace quarry
