// Built into libquarry_sentencepiece.so, alone with SentencePiece.
#include "gpu/sentencepiece_module.h"

#include <sentencepiece_processor.h>

#include <memory>
#include <string>
#include <vector>

namespace quarry {
namespace {

struct LoadedModel {
  sentencepiece::SentencePieceProcessor processor;
  std::vector<int> ids;
  std::string text;
  std::string error;
};

const char* Outcome(LoadedModel* model, const sentencepiece::util::Status& status) {
  if (status.ok()) return nullptr;
  model->error = status.ToString();
  return model->error.c_str();
}

void* Load(const char* path, const char** error) {
  static std::string failure;
  auto model = std::make_unique<LoadedModel>();
  *error = Outcome(model.get(), model->processor.Load(path));
  if (*error == nullptr) return model.release();
  failure = model->error;
  *error = failure.c_str();
  return nullptr;
}

void Destroy(void* model) { delete static_cast<LoadedModel*>(model); }

const char* Encode(void* opaque, const char* text, size_t bytes, const int** ids, size_t* count) {
  auto* const model = static_cast<LoadedModel*>(opaque);
  const auto status = model->processor.Encode({text, bytes}, &model->ids);
  *ids = model->ids.data();
  *count = model->ids.size();
  return Outcome(model, status);
}

const char* Decode(void* opaque, const int* ids, size_t count, const char** text, size_t* bytes) {
  auto* const model = static_cast<LoadedModel*>(opaque);
  // A model's vocabulary may be larger than its tokenizer's.
  model->ids.assign(ids, ids + count);
  for (int& id : model->ids) {
    if (id < 0 || id >= model->processor.GetPieceSize()) id = model->processor.unk_id();
  }
  const auto status = model->processor.Decode(model->ids, &model->text);
  *text = model->text.data();
  *bytes = model->text.size();
  return Outcome(model, status);
}

int BosId(const void* model) { return static_cast<const LoadedModel*>(model)->processor.bos_id(); }

}  // namespace
}  // namespace quarry

extern "C" __attribute__((visibility("default"))) const quarry::SentencePieceModule
    quarry_sentencepiece = {quarry::Load, quarry::Destroy, quarry::Encode, quarry::Decode,
                            quarry::BosId};
