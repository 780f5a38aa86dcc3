// config.json: what is read, what is refused, and the rotary embeddings that follow.
#include "gpu/model_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numbers>
#include <string>

#include <nlohmann/json.hpp>

#include "proto/identity.h"

namespace quarry {
namespace {

using nlohmann::json;

json Llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"intermediate_size", 128},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-6},
          {"torch_dtype", "float16"},
          {"rope_theta", 500000.0}};
}

json Phi3Long() {
  json c = Llama();
  c["architectures"] = {"Phi3ForCausalLM"};
  c["max_position_embeddings"] = 131072;
  c["original_max_position_embeddings"] = 4096;
  c["sliding_window"] = 262144;
  c["rope_scaling"] = {{"type", "su"},
                       {"short_factor", json::array({1, 1, 1, 1, 1.25, 1, 1, 1})},
                       {"long_factor", json::array({1, 2, 4, 8, 16, 32, 32, 32})}};
  return c;
}

class ModelConfigTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "quarry-mc-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  absl::StatusOr<ModelConfig> Read(const json& config) {
    std::ofstream(directory_ + "/config.json") << config.dump();
    return LoadModelConfig(directory_);
  }
  ModelConfig MustRead(const json& config) {
    auto out = Read(config);
    EXPECT_TRUE(out.ok()) << out.status();
    return out.ok() ? *out : ModelConfig{};
  }
  // The refusal names config.json and every one of the words.
  void ExpectRefused(const json& config, absl::StatusCode code,
                     std::initializer_list<const char*> words) {
    const absl::Status status = Read(config).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_NE(std::string(status.message()).find("config.json"), std::string::npos) << status;
    for (const char* word : words) {
      EXPECT_NE(std::string(status.message()).find(word), std::string::npos)
          << status << " does not say " << word;
    }
  }

  std::string directory_;
};

TEST_F(ModelConfigTest, FieldsAndDefaultsOfTheLlamaFamily) {
  const ModelConfig c = MustRead(Llama());
  EXPECT_EQ(c.family, ModelFamily::kLlama);
  EXPECT_EQ(c.head_dim, 16u);
  EXPECT_EQ(c.kv_heads, 2u);
  EXPECT_EQ(c.dtype, DType::kFp16);
  EXPECT_EQ(c.norm_eps, 1e-6f);
  EXPECT_FALSE(c.tied_head);
  EXPECT_EQ(c.sliding_window, 0u);
  EXPECT_TRUE(c.end_tokens.empty());

  json mistral = Llama();
  mistral["architectures"] = {"MistralForCausalLM"};
  mistral["sliding_window"] = nullptr;
  mistral["head_dim"] = 32;
  mistral["tie_word_embeddings"] = true;
  mistral.erase("num_key_value_heads");
  mistral.erase("torch_dtype");
  mistral["dtype"] = "float32";
  const ModelConfig m = MustRead(mistral);
  EXPECT_EQ(m.kv_heads, 4u) << "as many as query heads";
  EXPECT_EQ(m.head_dim, 32u);
  EXPECT_EQ(m.dtype, DType::kFp32);
  EXPECT_TRUE(m.tied_head);
}

TEST_F(ModelConfigTest, EndTokensComeFromBothFiles) {
  json c = Llama();
  c["eos_token_id"] = 2;
  EXPECT_EQ(MustRead(c).end_tokens, std::vector<uint32_t>{2});
  std::ofstream(directory_ + "/generation_config.json") << R"({"eos_token_id": [2, 7, 100000]})";
  EXPECT_EQ(MustRead(c).end_tokens, (std::vector<uint32_t>{2, 7}));
  std::ofstream(directory_ + "/generation_config.json") << "no JSON";
  EXPECT_TRUE(absl::IsInvalidArgument(Read(c).status()));
}

TEST_F(ModelConfigTest, WhatIsNotSupportedIsNamed) {
  const auto with = [](const char* key, json value) {
    json c = Llama();
    c[key] = std::move(value);
    return c;
  };
  using enum absl::StatusCode;
  ExpectRefused(with("architectures", {"Qwen2ForCausalLM"}), kUnimplemented, {"Qwen2ForCausalLM"});
  ExpectRefused(with("attention_bias", true), kUnimplemented, {"attention_bias"});
  ExpectRefused(with("mlp_bias", true), kUnimplemented, {"mlp_bias"});
  ExpectRefused(with("hidden_act", "gelu"), kUnimplemented, {"hidden_act", "gelu"});
  ExpectRefused(with("quantization_config", {{"bits", 4}}), kUnimplemented,
                {"quantization_config"});
  ExpectRefused(with("rope_scaling", {{"type", "yarn"}, {"original_max_position_embeddings", 9}}),
                kUnimplemented, {"yarn"});
  ExpectRefused(with("torch_dtype", "int8"), kInvalidArgument, {"torch_dtype", "int8"});
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
                          "max_position_embeddings", "num_attention_heads"}) {
    ExpectRefused(with(key, nullptr), kInvalidArgument, {key, "missing"});
    ExpectRefused(with(key, -4), kInvalidArgument, {key, "-4"});
    ExpectRefused(with(key, "many"), kInvalidArgument, {key, "many"});
    ExpectRefused(with(key, 1e30), kInvalidArgument, {key});
  }
  ExpectRefused(with("rope_theta", 0), kInvalidArgument, {"rope_theta", "0"});
  ExpectRefused(with("partial_rotary_factor", 1.5), kInvalidArgument, {"partial_rotary_factor"});
  ExpectRefused(with("rope_scaling", "longrope"), kInvalidArgument, {"rope_scaling"});
  ExpectRefused(
      with("rope_scaling", {{"rope_type", "llama3"}, {"original_max_position_embeddings", 1024}}),
      kInvalidArgument, {"factor", "missing"});
  EXPECT_FALSE(Read(with("num_key_value_heads", 3)).ok());
  EXPECT_FALSE(Read(with("head_dim", 24)).ok());

  json phi = Phi3Long();
  phi["rope_scaling"]["long_factor"].push_back(1);
  ExpectRefused(phi, kInvalidArgument, {"long_factor", "8"});
  phi = Phi3Long();
  phi["rope_scaling"]["short_factor"][3] = 0;
  ExpectRefused(phi, kInvalidArgument, {"short_factor", "0"});
  phi = Phi3Long();
  phi.erase("original_max_position_embeddings");
  ExpectRefused(phi, kInvalidArgument, {"original_max_position_embeddings"});

  std::ofstream(directory_ + "/config.json") << "{\"vocab_size\": ";
  EXPECT_TRUE(absl::IsInvalidArgument(LoadModelConfig(directory_).status()));
  EXPECT_TRUE(absl::IsNotFound(LoadModelConfig(directory_ + "/none").status()));
}

TEST_F(ModelConfigTest, DefaultAndLlama3Frequencies) {
  json c = Llama();
  auto rope = RopeFor(MustRead(c), 100);
  ASSERT_TRUE(rope.ok());
  ASSERT_EQ(rope->inv_freq.size(), 8u);
  EXPECT_EQ(rope->regime, RopeRegime::kNone);
  EXPECT_EQ(rope->attention_scale, 1.0f);
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_NEAR(rope->inv_freq[i] * std::pow(5e5, i / 8.0), 1.0, 1e-6);
  }

  c["rope_scaling"] = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 64}};
  auto scaled = RopeFor(MustRead(c), 100);
  ASSERT_TRUE(scaled.ok());
  bool fast = false, blended = false, slow = false;
  for (size_t i = 0; i < 8; ++i) {
    const double f = rope->inv_freq[i], wavelength = 2 * std::numbers::pi / f;
    double want = f;
    if (wavelength > 64) {
      want = f / 8;
      slow = true;
    } else if (wavelength >= 16) {
      const double smooth = (64 / wavelength - 1) / 3;
      want = (1 - smooth) * f / 8 + smooth * f;
      blended = true;
    } else {
      fast = true;
    }
    EXPECT_NEAR(scaled->inv_freq[i] / want, 1.0, 1e-6) << i;
  }
  EXPECT_TRUE(fast && blended && slow);
}

TEST_F(ModelConfigTest, LongRopeRegimeIsPinnedByTheContextsMaximum) {
  const ModelConfig c = MustRead(Phi3Long());
  EXPECT_EQ(c.sliding_window, 262144u);
  auto is_short = RopeFor(c, 4096), is_long = RopeFor(c, 4097), longest = RopeFor(c, 131072);
  ASSERT_TRUE(is_short.ok() && is_long.ok() && longest.ok());
  EXPECT_EQ(is_short->regime, RopeRegime::kShort);
  EXPECT_EQ(is_short->regime_max_tokens, 4096u);
  EXPECT_EQ(is_long->regime, RopeRegime::kLong);
  EXPECT_EQ(is_long->regime_max_tokens, 0u);
  const double factors[2][8] = {{1, 1, 1, 1, 1.25, 1, 1, 1}, {1, 2, 4, 8, 16, 32, 32, 32}};
  for (size_t i = 0; i < 8; ++i) {
    const double plain = std::pow(5e5, -(i / 8.0));
    EXPECT_NEAR(is_short->inv_freq[i] * factors[0][i] / plain, 1.0, 1e-6);
    EXPECT_NEAR(is_long->inv_freq[i] * factors[1][i] / plain, 1.0, 1e-6);
  }
  // Phi-3-mini-128k's: s = 32, L = 4096, in both regimes.
  EXPECT_NEAR(is_long->attention_scale, 1.19024f, 1e-5);
  EXPECT_EQ(is_short->attention_scale, is_long->attention_scale);
  EXPECT_NE(RopeSignatureOf(*is_short), RopeSignatureOf(*is_long));
  EXPECT_EQ(RopeSignatureOf(*is_long), RopeSignatureOf(*longest));
  EXPECT_TRUE(absl::IsFailedPrecondition(RopeFor(c, 131073).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(RopeFor(c, 0).status()));

  json given = Phi3Long();
  given["rope_scaling"]["attention_factor"] = 1.5;
  EXPECT_EQ(RopeFor(MustRead(given), 9000)->attention_scale, 1.5f);
}

TEST_F(ModelConfigTest, BothSpellingsOfRopeAgree) {
  for (const double partial : {1.0, 0.5}) {
    json old = Phi3Long();
    old["partial_rotary_factor"] = partial;
    if (partial != 1.0) {
      for (const char* key : {"short_factor", "long_factor"}) {
        old["rope_scaling"][key] = json::array({1, 2, 3, 4});
      }
    }
    json now = old;
    now["rope_parameters"] = now["rope_scaling"];
    now["rope_parameters"]["rope_type"] = "longrope";
    now["rope_parameters"].erase("type");
    for (const char* key :
         {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}) {
      now["rope_parameters"][key] = now[key];
      now.erase(key);
    }
    now.erase("rope_scaling");
    for (const uint32_t max_tokens : {1000u, 100000u}) {
      auto a = RopeFor(MustRead(old), max_tokens), b = RopeFor(MustRead(now), max_tokens);
      ASSERT_TRUE(a.ok() && b.ok());
      EXPECT_EQ(a->rotary_dim, static_cast<uint32_t>(16 * partial));
      EXPECT_EQ(RopeSignatureOf(*a), RopeSignatureOf(*b));
    }
  }
}

}  // namespace
}  // namespace quarry
