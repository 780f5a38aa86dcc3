#include "gpu/model_config.h"

#include <cmath>
#include <fstream>
#include <numbers>
#include <string_view>

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
    return absl::UnimplementedError(absl::StrCat(
        in.path(), ": architecture ", name, " is not one of the Llama and Phi-3 families"));
  }
  if (in.Flag("attention_bias") || in.Flag("mlp_bias")) {
    return absl::UnimplementedError(absl::StrCat(in.path(), ": biases are not supported"));
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

absl::Status ReadRope(const Reader& in, ModelConfig* out) {
  RopeConfig& rope = out->rope;
  QUARRY_RETURN_IF_ERROR(in.Number("rope_theta", &rope.theta));
  QUARRY_RETURN_IF_ERROR(in.Number("partial_rotary_factor", &rope.partial_rotary_factor));
  const char* key = in.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  if (!in.Has(key)) return absl::OkStatus();
  if (!in.object()[key].is_object()) return in.Error(key, "is not an object");
  const Reader scaling(in.path() + ": " + key, in.object()[key]);
  QUARRY_RETURN_IF_ERROR(scaling.Number("rope_theta", &rope.theta));
  QUARRY_RETURN_IF_ERROR(scaling.Number("partial_rotary_factor", &rope.partial_rotary_factor));
  const std::string type = scaling.Text("rope_type", scaling.Text("type", "default"));
  if (type == "default") return absl::OkStatus();
  const Reader& lengths = scaling.Has("original_max_position_embeddings") ? scaling : in;
  QUARRY_RETURN_IF_ERROR(
      lengths.Count("original_max_position_embeddings", &rope.original_max_tokens));
  if (type == "llama3") {
    rope.type = RopeConfig::Type::kLlama3;
    QUARRY_RETURN_IF_ERROR(scaling.Number("factor", &rope.factor));
    QUARRY_RETURN_IF_ERROR(scaling.Number("low_freq_factor", &rope.low_freq_factor));
    return scaling.Number("high_freq_factor", &rope.high_freq_factor);
  }
  if (type == "longrope" || type == "su") {
    rope.type = RopeConfig::Type::kLongRope;
    const size_t pairs =
        static_cast<size_t>(out->head_dim * rope.partial_rotary_factor) / 2;
    QUARRY_RETURN_IF_ERROR(scaling.Number("attention_factor", &rope.attention_factor));
    QUARRY_RETURN_IF_ERROR(scaling.Numbers("short_factor", pairs, &rope.short_factor));
    return scaling.Numbers("long_factor", pairs, &rope.long_factor);
  }
  return absl::UnimplementedError(absl::StrCat(scaling.path(), ": rope type ", type));
}

// Llama 3.1: slow frequencies are stretched, fast ones kept, those between blended.
double Llama3Frequency(double frequency, const RopeConfig& rope) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double original = rope.original_max_tokens;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * frequency / rope.factor + smooth * frequency;
}

}  // namespace

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, " cannot be read"));
  const json object = json::parse(file, nullptr, false);
  if (!object.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": not JSON"));
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
  KvShape shape{out.layers, out.heads, out.kv_heads, out.head_dim, out.dtype};
  ModelSpec spec;
  spec.shape = shape;
  QUARRY_ASSIGN_OR_RETURN(spec.rope, RopeFor(out, out.max_tokens));
  QUARRY_RETURN_IF_ERROR(ValidateModelSpec(spec));
  return out;
}

absl::StatusOr<RopeSpec> RopeFor(const ModelConfig& config, uint32_t max_tokens) {
  const RopeConfig& rope = config.rope;
  if (max_tokens == 0 || max_tokens > config.max_tokens) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a context of ", max_tokens, " tokens; the model takes 1 to ", config.max_tokens));
  }
  RopeSpec spec;
  spec.rotary_dim =
      static_cast<uint32_t>(config.head_dim * rope.partial_rotary_factor) / 2 * 2;
  spec.dtype = DType::kFp32;
  const std::vector<double>* factors = nullptr;
  if (rope.type == RopeConfig::Type::kLongRope) {
    const bool is_long = max_tokens > rope.original_max_tokens;
    spec.regime = is_long ? RopeRegime::kLong : RopeRegime::kShort;
    spec.regime_max_tokens = is_long ? 0 : rope.original_max_tokens;
    factors = is_long ? &rope.long_factor : &rope.short_factor;
    const double stretch =
        static_cast<double>(config.max_tokens) / rope.original_max_tokens;
    if (rope.attention_factor > 0) {
      spec.attention_scale = static_cast<float>(rope.attention_factor);
    } else if (stretch > 1) {
      spec.attention_scale = static_cast<float>(
          std::sqrt(1 + std::log(stretch) / std::log(double{1} * rope.original_max_tokens)));
    }
  }
  for (uint32_t i = 0; i < spec.rotary_dim / 2; ++i) {
    const double power = std::pow(rope.theta, 2.0 * i / spec.rotary_dim);
    double frequency;
    if (factors != nullptr) {
      // In fp32, as the reference computes it.
      frequency = 1.0f / (static_cast<float>((*factors)[i]) * static_cast<float>(power));
    } else {
      frequency = 1.0f / static_cast<float>(power);
    }
    if (rope.type == RopeConfig::Type::kLlama3) frequency = Llama3Frequency(frequency, rope);
    spec.inv_freq.push_back(static_cast<float>(frequency));
  }
  return spec;
}

}  // namespace quarry
