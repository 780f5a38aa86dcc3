#include "gpu/sentencepiece_model.h"

#include <sentencepiece_processor.h>

namespace quarry {

struct SentencePieceModel::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceModel::SentencePieceModel() : impl_(std::make_unique<Impl>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::string SentencePieceModel::Load(const std::string& path) {
  const auto status = impl_->processor.Load(path);
  return status.ok() ? std::string() : status.ToString();
}

std::string SentencePieceModel::Encode(const std::string& text, std::vector<int>* ids) const {
  const auto status = impl_->processor.Encode(text, ids);
  return status.ok() ? std::string() : status.ToString();
}

std::string SentencePieceModel::Decode(const std::vector<int>& ids) const {
  std::string text;
  (void)impl_->processor.Decode(ids, &text);
  return text;
}

int SentencePieceModel::bos_id() const { return impl_->processor.bos_id(); }

}  // namespace quarry
