#include "gpu/model_config.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

using nlohmann::json;

// Reads keys of one config.json; every error names the file, the key and the value.
class Reader {
 public:
  Reader(std::string path, const json& object) : path_(std::move(path)), object_(object) {}

  bool Has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }

  absl::Status Error(const char* key, const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", key, " ", what));
  }

  absl::Status Count(const char* key, uint32_t* out, uint32_t otherwise = 0) const {
    if (!Has(key)) {
      if (otherwise == 0) return Error(key, "is missing");
      *out = otherwise;
      return absl::OkStatus();
    }
    const json& x = object_[key];
    if (!x.is_number_integer() || x.get<int64_t>() <= 0 || x.get<int64_t>() > (1 << 30)) {
      return Error(key, absl::StrCat("is ", x.dump(), ", a count is wanted"));
    }
    *out = x.get<uint32_t>();
    return absl::OkStatus();
  }

  absl::Status Number(const char* key, double* out) const {
    if (!Has(key)) return absl::OkStatus();
    const json& x = object_[key];
    if (!x.is_number() || !std::isfinite(x.get<double>()) || x.get<double>() <= 0) {
      return Error(key, absl::StrCat("is ", x.dump(), ", a positive number is wanted"));
    }
    *out = x.get<double>();
    return absl::OkStatus();
  }

  absl::Status Numbers(const char* key, size_t size, std::vector<double>* out) const {
    if (!Has(key) || !object_[key].is_array() || object_[key].size() != size) {
      return Error(key, absl::StrCat("must be a list of ", size, " numbers"));
    }
    for (const json& x : object_[key]) {
      if (!x.is_number() || !std::isfinite(x.get<double>()) || x.get<double>() <= 0) {
        return Error(key, absl::StrCat("has an entry ", x.dump()));
      }
      out->push_back(x.get<double>());
    }
    return absl::OkStatus();
  }

  std::string Text(const char* key, std::string otherwise) const {
    return Has(key) && object_[key].is_string() ? object_[key].get<std::string>()
                                                : std::move(otherwise);
  }
  bool Flag(const char* key) const {
    return Has(key) && object_[key].is_boolean() && object_[key].get<bool>();
  }
  const json& object() const { return object_; }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
  const json& object_;
};

absl::Status ReadFamily(const Reader& in, ModelConfig* out) {
  std::string name = in.Text("model_type", "");
  if (in.Has("architectures") && in.object()["architectures"].is_array() &&
      !in.object()["architectures"].empty() && in.object()["architectures"][0].is_string()) {
    name = in.object()["architectures"][0].get<std::string>();
  }
  if (name == "LlamaForCausalLM" || name == "MistralForCausalLM" || name == "llama" ||
      name == "mistral") {
    out->family = ModelFamily::kLlama;
  } else if (name == "Phi3ForCausalLM" || name == "phi3") {
    out->family = ModelFamily::kPhi3;
  } else {
    return absl::UnimplementedError(absl::StrCat(in.path(), ": architecture ", name,
                                                 " is not one of the Llama and Phi-3 families"));
  }
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (!in.Flag(key)) continue;
    return absl::UnimplementedError(
        absl::StrCat(in.path(), ": ", key, " is true, biases are not supported"));
  }
  if (in.Has("quantization_config")) {
    return absl::UnimplementedError(absl::StrCat(
        in.path(), ": quantization_config is set, only bf16, fp16 and fp32 weights are supported"));
  }
  const std::string activation = in.Text("hidden_act", "silu");
  if (activation != "silu") {
    return absl::UnimplementedError(absl::StrCat(in.path(), ": hidden_act ", activation));
  }
  return absl::OkStatus();
}

absl::Status ReadDType(const Reader& in, ModelConfig* out) {
  const std::string name = in.Text("torch_dtype", in.Text("dtype", "bfloat16"));
  if (name == "bfloat16") {
    out->dtype = DType::kBf16;
  } else if (name == "float16") {
    out->dtype = DType::kFp16;
  } else if (name == "float32") {
    out->dtype = DType::kFp32;
  } else {
    return in.Error("torch_dtype", absl::StrCat("is ", name));
  }
  return absl::OkStatus();
}

// What stands at the top level in older files and beside the type in newer ones.
absl::Status ReadRopeBase(const Reader& in, RopeConfig* rope) {
  QUARRY_RETURN_IF_ERROR(in.Number("rope_theta", &rope->theta));
  QUARRY_RETURN_IF_ERROR(in.Number("partial_rotary_factor", &rope->partial_rotary_factor));
  if (rope->partial_rotary_factor <= 1) return absl::OkStatus();
  return in.Error("partial_rotary_factor",
                  absl::StrCat("is ", rope->partial_rotary_factor, ", must not exceed 1"));
}

absl::Status ReadRope(const Reader& in, ModelConfig* out) {
  RopeConfig& rope = out->rope;
  QUARRY_RETURN_IF_ERROR(ReadRopeBase(in, &rope));
  const char* key = in.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  if (!in.Has(key)) return absl::OkStatus();
  if (!in.object()[key].is_object()) return in.Error(key, "is not an object");
  const Reader scaling(in.path() + ": " + key, in.object()[key]);
  QUARRY_RETURN_IF_ERROR(ReadRopeBase(scaling, &rope));
  const std::string type = scaling.Text("rope_type", scaling.Text("type", "default"));
  if (type == "default") return absl::OkStatus();
  const Reader& lengths = scaling.Has("original_max_position_embeddings") ? scaling : in;
  QUARRY_RETURN_IF_ERROR(
      lengths.Count("original_max_position_embeddings", &rope.original_max_tokens));
  if (type == "llama3") {
    rope.type = RopeConfig::Type::kLlama3;
    for (auto [name, value] : {std::pair{"factor", &rope.factor},
                               {"low_freq_factor", &rope.low_freq_factor},
                               {"high_freq_factor", &rope.high_freq_factor}}) {
      if (!scaling.Has(name)) return scaling.Error(name, "is missing");
      QUARRY_RETURN_IF_ERROR(scaling.Number(name, value));
    }
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      return scaling.Error("high_freq_factor",
                           absl::StrCat("is ", rope.high_freq_factor,
                                        ", must exceed low_freq_factor ", rope.low_freq_factor));
    }
    return absl::OkStatus();
  }
  if (type == "longrope" || type == "su") {
    rope.type = RopeConfig::Type::kLongRope;
    const size_t pairs = RotaryDim(rope, out->head_dim) / 2;
    QUARRY_RETURN_IF_ERROR(scaling.Number("attention_factor", &rope.attention_factor));
    QUARRY_RETURN_IF_ERROR(scaling.Numbers("short_factor", pairs, &rope.short_factor));
    return scaling.Numbers("long_factor", pairs, &rope.long_factor);
  }
  return absl::UnimplementedError(absl::StrCat(scaling.path(), ": rope type ", type));
}

// Ids that end a generation: one, a list, or none.
absl::Status ReadEndTokens(const Reader& in, ModelConfig* out) {
  const char* key = "eos_token_id";
  if (!in.Has(key)) return absl::OkStatus();
  const json& value = in.object()[key];
  out->end_tokens.clear();
  for (const json& id : value.is_array() ? value : json::array({value})) {
    if (!id.is_number_unsigned()) return in.Error(key, absl::StrCat("is ", value.dump()));
    if (id.get<uint64_t>() < out->vocab) out->end_tokens.push_back(id.get<uint32_t>());
  }
  return absl::OkStatus();
}

absl::StatusOr<json> ReadObject(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, " cannot be read"));
  json object = json::parse(file, nullptr, false);
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  }
  return object;
}

}  // namespace

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  QUARRY_ASSIGN_OR_RETURN(const json object, ReadObject(path));
  const Reader in(path, object);
  ModelConfig out;
  QUARRY_RETURN_IF_ERROR(ReadFamily(in, &out));
  QUARRY_RETURN_IF_ERROR(ReadDType(in, &out));
  QUARRY_RETURN_IF_ERROR(in.Count("vocab_size", &out.vocab));
  QUARRY_RETURN_IF_ERROR(in.Count("hidden_size", &out.hidden));
  QUARRY_RETURN_IF_ERROR(in.Count("intermediate_size", &out.intermediate));
  QUARRY_RETURN_IF_ERROR(in.Count("num_hidden_layers", &out.layers));
  QUARRY_RETURN_IF_ERROR(in.Count("num_attention_heads", &out.heads));
  QUARRY_RETURN_IF_ERROR(in.Count("num_key_value_heads", &out.kv_heads, out.heads));
  QUARRY_RETURN_IF_ERROR(in.Count("head_dim", &out.head_dim, out.hidden / out.heads));
  QUARRY_RETURN_IF_ERROR(in.Count("max_position_embeddings", &out.max_tokens));
  if (in.Has("sliding_window")) {
    QUARRY_RETURN_IF_ERROR(in.Count("sliding_window", &out.sliding_window));
  }
  double eps = 1e-5;
  QUARRY_RETURN_IF_ERROR(in.Number("rms_norm_eps", &eps));
  out.norm_eps = static_cast<float>(eps);
  out.tied_head = in.Flag("tie_word_embeddings");
  QUARRY_RETURN_IF_ERROR(ReadRope(in, &out));
  QUARRY_RETURN_IF_ERROR(ReadEndTokens(in, &out));
  const std::string generation = directory + "/generation_config.json";
  if (std::filesystem::exists(generation)) {
    QUARRY_ASSIGN_OR_RETURN(const json generation_object, ReadObject(generation));
    QUARRY_RETURN_IF_ERROR(ReadEndTokens(Reader(generation, generation_object), &out));
  }
  KvShape shape{out.layers, out.heads, out.kv_heads, out.head_dim, out.dtype};
  ModelSpec spec;
  spec.shape = shape;
  QUARRY_ASSIGN_OR_RETURN(spec.rope, RopeFor(out, out.max_tokens));
  QUARRY_RETURN_IF_ERROR(ValidateModelSpec(spec));
  return out;
}

absl::StatusOr<RopeSpec> RopeFor(const ModelConfig& config, uint32_t max_tokens) {
  if (max_tokens == 0 || max_tokens > config.max_tokens) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a context of ", max_tokens, " tokens; the model takes 1 to ", config.max_tokens));
  }
  return ComputeRope(config.rope, config.head_dim, config.max_tokens, max_tokens);
}

}  // namespace quarry
