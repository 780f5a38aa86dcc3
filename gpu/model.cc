#include "gpu/model.h"

#include <openssl/evp.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <set>
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

// Loads tensors onto the device, checking their shapes, and remembers which were wanted.
class Loader {
 public:
  Loader(const WeightFiles& files, Device* device) : files_(files), device_(device) {}

  absl::StatusOr<DeviceMatrix> Vector(const std::string& name, uint64_t width) {
    QUARRY_ASSIGN_OR_RETURN(HostMatrix stored, Find(name, {width}));
    return device_->Load(std::span(&stored, 1), width, name);
  }

  absl::StatusOr<DeviceMatrix> Matrix(const std::string& name, uint64_t rows, uint64_t width) {
    return Rows(name, rows, width, 0, rows);
  }

  // Rows [first, first + rows) of a fused matrix of `total` rows.
  absl::StatusOr<DeviceMatrix> Rows(const std::string& name, uint64_t total, uint64_t width,
                                    uint64_t first, uint64_t rows) {
    QUARRY_ASSIGN_OR_RETURN(HostMatrix stored, Find(name, {total, width}));
    const uint64_t row_bytes = width * DTypeBytes(stored.dtype);
    stored.bytes = stored.bytes.subspan(first * row_bytes, rows * row_bytes);
    stored.rows = rows;
    return device_->Load(std::span(&stored, 1), width, name);
  }

  // Two matrices of one shape, one above the other.
  absl::StatusOr<DeviceMatrix> Stacked(const std::string& above, const std::string& below,
                                       uint64_t rows, uint64_t width) {
    HostMatrix stored[2];
    QUARRY_ASSIGN_OR_RETURN(stored[0], Find(above, {rows, width}));
    QUARRY_ASSIGN_OR_RETURN(stored[1], Find(below, {rows, width}));
    return device_->Load(stored, width, above);
  }

  // Unimplemented names a tensor that nobody wanted.
  absl::Status CheckAllUsed(bool tied_head) const {
    for (const auto& file : files_.files()) {
      for (const auto& [name, tensor] : file->tensors()) {
        // Derived from the configuration, and stored by old versions all the same.
        if (name.ends_with("rotary_emb.inv_freq") || (tied_head && name == "lm_head.weight")) {
          continue;
        }
        if (used_.contains(name)) continue;
        return absl::UnimplementedError(absl::StrCat(
            file->path(), ": tensor ", name, " has no place in the configured architecture"));
      }
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<HostMatrix> Find(const std::string& name, const std::vector<uint64_t>& shape) {
    QUARRY_ASSIGN_OR_RETURN(TensorView tensor, files_.Find(name));
    used_.insert(name);
    const std::optional<DType> dtype = FloatingDType(tensor.dtype);
    if (tensor.shape != shape || !dtype) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", name, " is [", absl::StrJoin(tensor.shape, ", "), "]",
                       dtype ? "" : " of integers", ", [", absl::StrJoin(shape, ", "),
                       "] follows from the configuration"));
    }
    return HostMatrix{tensor.bytes, *dtype, shape.size() == 1 ? 1 : shape[0]};
  }

  static std::optional<DType> FloatingDType(TensorDType dtype) {
    switch (dtype) {
      case TensorDType::kBf16:
        return DType::kBf16;
      case TensorDType::kFp16:
        return DType::kFp16;
      case TensorDType::kFp32:
        return DType::kFp32;
      default:
        return std::nullopt;
    }
  }

  const WeightFiles& files_;
  Device* const device_;
  std::set<std::string> used_;
};

absl::Status LoadAttention(const ModelConfig& c, const std::string& at, Loader* loader,
                           LayerWeights* out) {
  const uint64_t q_rows = uint64_t{c.heads} * c.head_dim;
  const uint64_t kv_rows = uint64_t{c.kv_heads} * c.head_dim;
  if (c.family == ModelFamily::kPhi3) {
    const std::string fused = at + "qkv_proj.weight";
    const uint64_t total = q_rows + 2 * kv_rows;
    QUARRY_ASSIGN_OR_RETURN(out->q, loader->Rows(fused, total, c.hidden, 0, q_rows));
    QUARRY_ASSIGN_OR_RETURN(out->k, loader->Rows(fused, total, c.hidden, q_rows, kv_rows));
    QUARRY_ASSIGN_OR_RETURN(out->v,
                            loader->Rows(fused, total, c.hidden, q_rows + kv_rows, kv_rows));
  } else {
    QUARRY_ASSIGN_OR_RETURN(out->q, loader->Matrix(at + "q_proj.weight", q_rows, c.hidden));
    QUARRY_ASSIGN_OR_RETURN(out->k, loader->Matrix(at + "k_proj.weight", kv_rows, c.hidden));
    QUARRY_ASSIGN_OR_RETURN(out->v, loader->Matrix(at + "v_proj.weight", kv_rows, c.hidden));
  }
  QUARRY_ASSIGN_OR_RETURN(out->o, loader->Matrix(at + "o_proj.weight", c.hidden, q_rows));
  return absl::OkStatus();
}

absl::Status LoadLayer(const ModelConfig& c, uint32_t layer, Loader* loader, LayerWeights* out) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  QUARRY_ASSIGN_OR_RETURN(out->attention_norm,
                          loader->Vector(prefix + "input_layernorm.weight", c.hidden));
  QUARRY_ASSIGN_OR_RETURN(out->mlp_norm,
                          loader->Vector(prefix + "post_attention_layernorm.weight", c.hidden));
  QUARRY_RETURN_IF_ERROR(LoadAttention(c, prefix + "self_attn.", loader, out));
  const std::string mlp = prefix + "mlp.";
  if (c.family == ModelFamily::kPhi3) {
    QUARRY_ASSIGN_OR_RETURN(out->gate_up, loader->Matrix(mlp + "gate_up_proj.weight",
                                                         uint64_t{2} * c.intermediate, c.hidden));
  } else {
    QUARRY_ASSIGN_OR_RETURN(out->gate_up,
                            loader->Stacked(mlp + "gate_proj.weight", mlp + "up_proj.weight",
                                            c.intermediate, c.hidden));
  }
  QUARRY_ASSIGN_OR_RETURN(out->down,
                          loader->Matrix(mlp + "down_proj.weight", c.hidden, c.intermediate));
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
                          loader.Matrix("model.embed_tokens.weight", c.vocab, c.hidden));
  QUARRY_ASSIGN_OR_RETURN(model->final_norm_, loader.Vector("model.norm.weight", c.hidden));
  if (!c.tied_head) {
    QUARRY_ASSIGN_OR_RETURN(model->head_, loader.Matrix("lm_head.weight", c.vocab, c.hidden));
  }
  model->layers_.resize(c.layers);
  for (uint32_t l = 0; l < c.layers; ++l) {
    QUARRY_RETURN_IF_ERROR(LoadLayer(c, l, &loader, &model->layers_[l]));
  }
  QUARRY_RETURN_IF_ERROR(loader.CheckAllUsed(c.tied_head));
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
