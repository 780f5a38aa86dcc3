#include "proto/model_spec.h"

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace quarry {
namespace {

using ::testing::HasSubstr;

ModelSpec Valid() {
  ModelSpec spec;
  spec.name = "llama";
  spec.shape = {32, 32, 8, 128, DType::kBf16};
  spec.rope.inv_freq.assign(64, 0.5f);
  spec.rope.rotary_dim = 128;
  return spec;
}

TEST(ModelSpecTest, UsualModelsAreValid) {
  EXPECT_TRUE(ValidateModelSpec(Valid()).ok());
  ModelSpec no_rope = Valid();
  no_rope.rope = {};
  EXPECT_TRUE(ValidateModelSpec(no_rope).ok());
  ModelSpec partial = Valid();  // rotates half of each head
  partial.rope.inv_freq.resize(32);
  partial.rope.rotary_dim = 64;
  EXPECT_TRUE(ValidateModelSpec(partial).ok());
  ModelSpec largest = Valid();
  largest.shape = {1024, 1024, 1024, 512, DType::kFp32};
  EXPECT_TRUE(ValidateModelSpec(largest).ok());
}

// An error that does not name field and value sends its reader guessing.
TEST(ModelSpecTest, ErrorsNameTheFieldAndItsValue) {
  using Change = std::function<void(ModelSpec&)>;
  struct Case {
    Change change;
    std::string field, value;
  };
  const float kNan = std::numeric_limits<float>::quiet_NaN();
  const float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<Case> cases = {
      {[](ModelSpec& s) { s.shape.layers = 0; }, "layers", "0"},
      {[](ModelSpec& s) { s.shape.layers = 1025; }, "layers", "1025"},
      {[](ModelSpec& s) { s.shape.heads = 0; }, "heads", "0"},
      {[](ModelSpec& s) { s.shape.heads = 4294967295u; }, "heads", "4294967295"},
      {[](ModelSpec& s) { s.shape.kv_heads = 0; }, "kv_heads", "0"},
      {[](ModelSpec& s) { s.shape.kv_heads = 33; }, "kv_heads", "33"},
      {[](ModelSpec& s) { s.shape.kv_heads = 7; }, "kv_heads", "7"},
      {[](ModelSpec& s) { s.shape.head_dim = 0; }, "head_dim", "0"},
      {[](ModelSpec& s) { s.shape.head_dim = 120; }, "head_dim", "120"},
      {[](ModelSpec& s) { s.shape.head_dim = 528; }, "head_dim", "528"},
      {[](ModelSpec& s) { s.shape.dtype = static_cast<DType>(0); }, "dtype", "0"},
      {[](ModelSpec& s) { s.shape.dtype = static_cast<DType>(4); }, "dtype", "4"},
      {[](ModelSpec& s) { s.rope.rotary_dim = 126; }, "rotary_dim", "126"},
      {[](ModelSpec& s) { s.rope.inv_freq.pop_back(); }, "rotary_dim", "63"},
      {[](ModelSpec& s) { s.rope.inv_freq.resize(65); s.rope.rotary_dim = 130; }, "rotary_dim", "130"},
      {[](ModelSpec& s) { s.rope.attention_scale = 0; }, "attention_scale", "0"},
      {[](ModelSpec& s) { s.rope.attention_scale = -1; }, "attention_scale", "-1"},
      {[&](ModelSpec& s) { s.rope.attention_scale = kNan; }, "attention_scale", "nan"},
      {[&](ModelSpec& s) { s.rope.attention_scale = kInfinity; }, "attention_scale", "inf"},
      {[&](ModelSpec& s) { s.rope.inv_freq[63] = kNan; }, "inv_freq", "63"},
      {[](ModelSpec& s) { s.rope.regime = static_cast<RopeRegime>(3); }, "regime", "3"},
      {[](ModelSpec& s) { s.rope.dtype = static_cast<DType>(9); }, "rope dtype", "9"},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    ModelSpec spec = Valid();
    cases[i].change(spec);
    const absl::Status status = ValidateModelSpec(spec);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << "case " << i;
    EXPECT_THAT(std::string(status.message()), HasSubstr(cases[i].field)) << "case " << i;
    EXPECT_THAT(std::string(status.message()), HasSubstr(cases[i].value)) << "case " << i;
  }
}

}  // namespace
}  // namespace quarry
