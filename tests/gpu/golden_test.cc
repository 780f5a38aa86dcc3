// The worker against Hugging Face transformers: logits and greedy tokens of every golden file.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "gpu/safetensors.h"
#include "gpu/sampler.h"
#include "gpu/sequence.h"

namespace quarry {
namespace {

struct Golden {
  std::string model;  // directory
  std::string file;
};

std::vector<Golden> Goldens() {
  const std::filesystem::path root = QUARRY_TEST_MODELS;
  std::vector<Golden> out;
  for (const char* model : {"llama-a", "phi3-b"}) {
    for (const auto& entry : std::filesystem::directory_iterator(root / "goldens" / model)) {
      out.push_back({root / model, entry.path()});
    }
  }
  for (const auto& tiny : std::filesystem::directory_iterator(root / "tiny")) {
    for (const auto& entry : std::filesystem::directory_iterator(tiny)) {
      if (entry.path().filename().string().starts_with("golden")) {
        out.push_back({tiny.path(), entry.path()});
      }
    }
  }
  std::sort(out.begin(), out.end(), [](auto& a, auto& b) { return a.file < b.file; });
  return out;
}

std::vector<uint32_t> Ids(const TensorView& tensor) {
  std::vector<uint32_t> out;
  for (uint64_t i = 0; i < tensor.elements(); ++i) {
    out.push_back(static_cast<uint32_t>(tensor.at(i)));
  }
  return out;
}

class GoldenTest : public ::testing::TestWithParam<Golden> {};

TEST_P(GoldenTest, LogitsAndGreedyTokensAgreeWithTransformers) {
  auto file = SafetensorsFile::Open(GetParam().file);
  ASSERT_TRUE(file.ok()) << file.status();
  const std::vector<uint32_t> prompt = Ids(*(*file)->Find("prompt"));
  const std::vector<uint32_t> greedy = Ids(*(*file)->Find("greedy"));
  const TensorView want = *(*file)->Find("logits_last");
  const TensorView gap = *(*file)->Find("gap");

  std::unique_ptr<Device> device = MakeHostDevice({});
  auto model = Model::Load(GetParam().model, device.get());
  ASSERT_TRUE(model.ok()) << model.status();
  // Room for exactly these tokens pins the same rope regime that the golden's lengths imply.
  const uint32_t max_tokens = static_cast<uint32_t>(prompt.size() + greedy.size());
  SequenceOptions options;
  options.kv_dtype = DType::kFp32;
  auto sequence = Sequence::Open(**model, *device, nullptr, options, prompt, max_tokens);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  auto logits = (*sequence)->Extend(prompt, Sequence::Role::kPrompt);
  ASSERT_TRUE(logits.ok()) << logits.status();
  ASSERT_EQ(logits->size(), want.elements());
  float low = want.at(0), high = want.at(0), worst = 0;
  for (uint64_t i = 0; i < want.elements(); ++i) {
    low = std::min(low, want.at(i));
    high = std::max(high, want.at(i));
    worst = std::max(worst, std::abs((*logits)[i] - want.at(i)));
  }
  EXPECT_LE(worst, 1e-4f * (high - low)) << "range " << high - low;
  RecordProperty("worst_over_range", std::to_string(worst / (high - low)));

  Sampler sampler({});
  for (size_t i = 0; i < greedy.size(); ++i) {
    const uint32_t token = sampler.Next(*logits);
    ASSERT_EQ(token, greedy[i]) << "step " << i << ", the oracle's gap is " << gap.at(i);
    if (i + 1 == greedy.size()) break;
    logits = (*sequence)->Extend(std::span(&token, 1), Sequence::Role::kBudgeted);
    ASSERT_TRUE(logits.ok()) << logits.status();
  }
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenTest, ::testing::ValuesIn(Goldens()), [](const auto& info) {
  std::string name = std::filesystem::path(info.param.model).filename().string() + "_" +
                     std::filesystem::path(info.param.file).stem().string();
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

}  // namespace
}  // namespace quarry
