#include "gpu/model.h"

#include <openssl/evp.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gpu/safetensors.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// SHA-256 over byte strings, each with its length first.
class FileDigest {
 public:
  FileDigest() : context_(EVP_MD_CTX_new()) {
    QUARRY_CHECK(context_ != nullptr && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1);
  }
  ~FileDigest() { EVP_MD_CTX_free(context_); }
  FileDigest(const FileDigest&) = delete;
  FileDigest& operator=(const FileDigest&) = delete;

  void Add(std::span<const std::byte> bytes) {
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bytes.size() >> (8 * i));
    EVP_DigestUpdate(context_, length, sizeof(length));
    EVP_DigestUpdate(context_, bytes.data(), bytes.size());
  }
  // False if there is no such file.
  bool AddFile(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) return false;
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    Add(std::as_bytes(std::span(text)));
    return true;
  }
  template <typename D>
  D Finish() {
    D out;
    unsigned int n = 0;
    QUARRY_CHECK(EVP_DigestFinal_ex(context_, out.bytes.data(), &n) == 1 && n == out.bytes.size());
    return out;
  }

 private:
  EVP_MD_CTX* context_;
};

// Loads tensors onto the device, checking their shapes.
class Loader {
 public:
  Loader(const WeightFiles& files, Device* device) : files_(files), device_(device) {}

  absl::StatusOr<DeviceBuffer> Load(const std::string& name, std::vector<uint64_t> shape) {
    QUARRY_ASSIGN_OR_RETURN(TensorView tensor, files_.Find(name));
    QUARRY_RETURN_IF_ERROR(CheckShape(name, tensor, shape));
    return Widen(name, tensor, 0, tensor.elements());
  }

  // Rows [first, first + rows) of a fused matrix of `total` rows.
  absl::StatusOr<DeviceBuffer> LoadRows(const std::string& name, uint64_t total, uint64_t width,
                                        uint64_t first, uint64_t rows) {
    QUARRY_ASSIGN_OR_RETURN(TensorView tensor, files_.Find(name));
    QUARRY_RETURN_IF_ERROR(CheckShape(name, tensor, {total, width}));
    return Widen(name, tensor, first * width, rows * width);
  }

  // Two matrices of the same width, one above the other.
  absl::StatusOr<DeviceBuffer> LoadStacked(const std::string& a, const std::string& b,
                                           uint64_t rows, uint64_t width) {
    QUARRY_ASSIGN_OR_RETURN(DeviceBuffer out, device_->Allocate(2 * rows * width * 4, a));
    float* at = out.floats();
    for (const std::string& name : {a, b}) {
      QUARRY_ASSIGN_OR_RETURN(TensorView tensor, files_.Find(name));
      QUARRY_RETURN_IF_ERROR(CheckShape(name, tensor, {rows, width}));
      for (uint64_t i = 0; i < rows * width; ++i) *at++ = tensor.at(i);
    }
    return out;
  }

 private:
  static absl::Status CheckShape(const std::string& name, const TensorView& tensor,
                                 const std::vector<uint64_t>& shape) {
    const bool floating = tensor.dtype == TensorDType::kBf16 ||
                          tensor.dtype == TensorDType::kFp16 || tensor.dtype == TensorDType::kFp32;
    if (tensor.shape == shape && floating) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", name, " is [", absl::StrJoin(tensor.shape, ", "), "]",
        floating ? "" : " of integers", ", [", absl::StrJoin(shape, ", "), "] is wanted"));
  }

  absl::StatusOr<DeviceBuffer> Widen(const std::string& name, const TensorView& tensor,
                                     uint64_t first, uint64_t count) {
    QUARRY_ASSIGN_OR_RETURN(DeviceBuffer out, device_->Allocate(count * 4, name));
    for (uint64_t i = 0; i < count; ++i) out.floats()[i] = tensor.at(first + i);
    return out;
  }

  const WeightFiles& files_;
  Device* const device_;
};

absl::Status LoadAttention(const ModelConfig& c, const std::string& prefix, Loader* loader,
                           LayerWeights* out) {
  const uint64_t q_rows = uint64_t{c.heads} * c.head_dim, kv_rows = uint64_t{c.kv_heads} * c.head_dim;
  const std::string at = prefix + "self_attn.";
  if (c.family == ModelFamily::kPhi3) {
    const std::string fused = at + "qkv_proj.weight";
    const uint64_t total = q_rows + 2 * kv_rows;
    QUARRY_ASSIGN_OR_RETURN(out->q, loader->LoadRows(fused, total, c.hidden, 0, q_rows));
    QUARRY_ASSIGN_OR_RETURN(out->k, loader->LoadRows(fused, total, c.hidden, q_rows, kv_rows));
    QUARRY_ASSIGN_OR_RETURN(out->v,
                            loader->LoadRows(fused, total, c.hidden, q_rows + kv_rows, kv_rows));
  } else {
    QUARRY_ASSIGN_OR_RETURN(out->q, loader->Load(at + "q_proj.weight", {q_rows, c.hidden}));
    QUARRY_ASSIGN_OR_RETURN(out->k, loader->Load(at + "k_proj.weight", {kv_rows, c.hidden}));
    QUARRY_ASSIGN_OR_RETURN(out->v, loader->Load(at + "v_proj.weight", {kv_rows, c.hidden}));
  }
  QUARRY_ASSIGN_OR_RETURN(out->o, loader->Load(at + "o_proj.weight", {c.hidden, q_rows}));
  return absl::OkStatus();
}

absl::Status LoadLayer(const ModelConfig& c, uint32_t layer, Loader* loader, LayerWeights* out) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  QUARRY_ASSIGN_OR_RETURN(out->attention_norm,
                          loader->Load(prefix + "input_layernorm.weight", {c.hidden}));
  QUARRY_ASSIGN_OR_RETURN(out->mlp_norm,
                          loader->Load(prefix + "post_attention_layernorm.weight", {c.hidden}));
  QUARRY_RETURN_IF_ERROR(LoadAttention(c, prefix, loader, out));
  const std::string mlp = prefix + "mlp.";
  if (c.family == ModelFamily::kPhi3) {
    QUARRY_ASSIGN_OR_RETURN(out->gate_up, loader->Load(mlp + "gate_up_proj.weight",
                                                       {uint64_t{2} * c.intermediate, c.hidden}));
  } else {
    QUARRY_ASSIGN_OR_RETURN(out->gate_up,
                            loader->LoadStacked(mlp + "gate_proj.weight", mlp + "up_proj.weight",
                                                c.intermediate, c.hidden));
  }
  QUARRY_ASSIGN_OR_RETURN(out->down,
                          loader->Load(mlp + "down_proj.weight", {c.hidden, c.intermediate}));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(const std::string& directory, Device* device) {
  auto model = std::unique_ptr<Model>(new Model);
  QUARRY_ASSIGN_OR_RETURN(model->config_, LoadModelConfig(directory));
  QUARRY_ASSIGN_OR_RETURN(WeightFiles files, WeightFiles::Open(directory));
  model->name_ = std::filesystem::path(directory).lexically_normal().filename().string();
  FileDigest weights;
  weights.AddFile(directory + "/config.json");
  for (const auto& file : files.files()) weights.Add(file->file_bytes());
  model->weights_digest_ = weights.Finish<WeightsDigest>();
  FileDigest tokenizer;
  bool any = false;
  for (const char* name : {"tokenizer.json", "tokenizer.model", "vocab.json"}) {
    any |= tokenizer.AddFile(absl::StrCat(directory, "/", name));
  }
  if (any) model->tokenizer_digest_ = tokenizer.Finish<TokenizerDigest>();

  const ModelConfig& c = model->config_;
  Loader loader(files, device);
  QUARRY_ASSIGN_OR_RETURN(model->embedding_,
                          loader.Load("model.embed_tokens.weight", {c.vocab, c.hidden}));
  QUARRY_ASSIGN_OR_RETURN(model->final_norm_, loader.Load("model.norm.weight", {c.hidden}));
  if (!c.tied_head) {
    QUARRY_ASSIGN_OR_RETURN(model->head_, loader.Load("lm_head.weight", {c.vocab, c.hidden}));
  }
  model->layers_.resize(c.layers);
  for (uint32_t l = 0; l < c.layers; ++l) {
    QUARRY_RETURN_IF_ERROR(LoadLayer(c, l, &loader, &model->layers_[l]));
  }
  return model;
}

absl::StatusOr<ModelSpec> Model::SpecFor(uint32_t max_tokens, DType kv_dtype) const {
  ModelSpec spec;
  spec.name = name_;
  spec.shape = {config_.layers, config_.heads, config_.kv_heads, config_.head_dim, kv_dtype};
  spec.weights = weights_digest_;
  spec.tokenizer = tokenizer_digest_;
  QUARRY_ASSIGN_OR_RETURN(spec.rope, RopeFor(config_, max_tokens));
  return spec;
}

}  // namespace quarry
