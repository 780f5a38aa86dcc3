#include "gpu/model_tensors.h"

#include <optional>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Finds tensors, checking their shapes, and remembers which were wanted.
class Finder {
 public:
  // `form` is of matrices.
  Finder(const WeightFiles& files, WeightForm form) : files_(files), form_(form) {}

  absl::StatusOr<StoredMatrix> Vector(const std::string& name, uint64_t width) {
    QUARRY_ASSIGN_OR_RETURN(HostMatrix stored, Find(name, {width}));
    return StoredMatrix{name, {stored}, width, WeightForm::kPlain};
  }

  // Plain, whatever the form of others.
  absl::StatusOr<StoredMatrix> Table(const std::string& name, uint64_t rows, uint64_t width) {
    QUARRY_ASSIGN_OR_RETURN(HostMatrix stored, Find(name, {rows, width}));
    return StoredMatrix{name, {stored}, width, WeightForm::kPlain};
  }

  absl::StatusOr<StoredMatrix> Matrix(const std::string& name, uint64_t rows, uint64_t width) {
    return Rows(name, rows, width, 0, rows);
  }

  // Rows [first, first + rows) of a fused matrix of `total` rows.
  absl::StatusOr<StoredMatrix> Rows(const std::string& name, uint64_t total, uint64_t width,
                                    uint64_t first, uint64_t rows) {
    QUARRY_ASSIGN_OR_RETURN(HostMatrix stored, Find(name, {total, width}));
    const uint64_t row_bytes = width * DTypeBytes(stored.dtype);
    stored.bytes = stored.bytes.subspan(first * row_bytes, rows * row_bytes);
    stored.rows = rows;
    return StoredMatrix{name, {stored}, width, form_};
  }

  // Two matrices of one shape, one above the other.
  absl::StatusOr<StoredMatrix> Stacked(const std::string& above, const std::string& below,
                                       uint64_t rows, uint64_t width) {
    QUARRY_ASSIGN_OR_RETURN(HostMatrix first, Find(above, {rows, width}));
    QUARRY_ASSIGN_OR_RETURN(HostMatrix second, Find(below, {rows, width}));
    return StoredMatrix{above, {first, second}, width, form_};
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
  const WeightForm form_;
  std::set<std::string> used_;
};

// The matrices of a layer by the order in which its unit has them.
enum Place { kAttentionNorm, kMlpNorm, kQ, kK, kV, kO, kGateUp, kDown, kPlaces };

absl::Status FindAttention(const ModelConfig& c, const std::string& at, Finder* finder,
                           StoredUnit* out) {
  const uint64_t q_rows = uint64_t{c.heads} * c.head_dim;
  const uint64_t kv_rows = uint64_t{c.kv_heads} * c.head_dim;
  if (c.family == ModelFamily::kPhi3) {
    const std::string fused = at + "qkv_proj.weight";
    const uint64_t total = q_rows + 2 * kv_rows;
    QUARRY_ASSIGN_OR_RETURN((*out)[kQ], finder->Rows(fused, total, c.hidden, 0, q_rows));
    QUARRY_ASSIGN_OR_RETURN((*out)[kK], finder->Rows(fused, total, c.hidden, q_rows, kv_rows));
    QUARRY_ASSIGN_OR_RETURN((*out)[kV],
                            finder->Rows(fused, total, c.hidden, q_rows + kv_rows, kv_rows));
  } else {
    QUARRY_ASSIGN_OR_RETURN((*out)[kQ], finder->Matrix(at + "q_proj.weight", q_rows, c.hidden));
    QUARRY_ASSIGN_OR_RETURN((*out)[kK], finder->Matrix(at + "k_proj.weight", kv_rows, c.hidden));
    QUARRY_ASSIGN_OR_RETURN((*out)[kV], finder->Matrix(at + "v_proj.weight", kv_rows, c.hidden));
  }
  QUARRY_ASSIGN_OR_RETURN((*out)[kO], finder->Matrix(at + "o_proj.weight", c.hidden, q_rows));
  return absl::OkStatus();
}

absl::StatusOr<StoredUnit> FindLayer(const ModelConfig& c, uint32_t layer, Finder* finder) {
  StoredUnit out(kPlaces);
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  QUARRY_ASSIGN_OR_RETURN(out[kAttentionNorm],
                          finder->Vector(prefix + "input_layernorm.weight", c.hidden));
  QUARRY_ASSIGN_OR_RETURN(out[kMlpNorm],
                          finder->Vector(prefix + "post_attention_layernorm.weight", c.hidden));
  QUARRY_RETURN_IF_ERROR(FindAttention(c, prefix + "self_attn.", finder, &out));
  const std::string mlp = prefix + "mlp.";
  if (c.family == ModelFamily::kPhi3) {
    QUARRY_ASSIGN_OR_RETURN(out[kGateUp], finder->Matrix(mlp + "gate_up_proj.weight",
                                                         uint64_t{2} * c.intermediate, c.hidden));
  } else {
    QUARRY_ASSIGN_OR_RETURN(out[kGateUp],
                            finder->Stacked(mlp + "gate_proj.weight", mlp + "up_proj.weight",
                                            c.intermediate, c.hidden));
  }
  QUARRY_ASSIGN_OR_RETURN(out[kDown],
                          finder->Matrix(mlp + "down_proj.weight", c.hidden, c.intermediate));
  return out;
}

}  // namespace

absl::StatusOr<ModelTensors> FindTensors(const ModelConfig& c, const WeightFiles& files,
                                         WeightForm form) {
  ModelTensors out;
  Finder finder(files, form);
  QUARRY_ASSIGN_OR_RETURN(out.embedding,
                          finder.Table("model.embed_tokens.weight", c.vocab, c.hidden));
  QUARRY_ASSIGN_OR_RETURN(out.final_norm, finder.Vector("model.norm.weight", c.hidden));
  if (!c.tied_head) {
    QUARRY_ASSIGN_OR_RETURN(out.head, finder.Table("lm_head.weight", c.vocab, c.hidden));
  }
  for (uint32_t l = 0; l < c.layers; ++l) {
    QUARRY_ASSIGN_OR_RETURN(StoredUnit layer, FindLayer(c, l, &finder));
    out.layers.push_back(std::move(layer));
  }
  QUARRY_RETURN_IF_ERROR(finder.CheckAllUsed(c.tied_head));
  return out;
}

LayerWeights LayerOf(std::vector<DeviceMatrix> unit) {
  QUARRY_CHECK(unit.size() == kPlaces);
  return {std::move(unit[kAttentionNorm]),
          std::move(unit[kMlpNorm]),
          std::move(unit[kQ]),
          std::move(unit[kK]),
          std::move(unit[kV]),
          std::move(unit[kO]),
          std::move(unit[kGateUp]),
          std::move(unit[kDown])};
}

}  // namespace quarry
