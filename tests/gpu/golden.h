// Golden files of tests/models: what transformers computed for a prompt.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "gpu/safetensors.h"
#include "gpu/sampler.h"
#include "gpu/sequence.h"

namespace quarry::testing {

struct Golden {
  std::string model;  // directory
  std::string file;

  std::string Name() const {
    std::string name = std::filesystem::path(model).filename().string() + "_" +
                       std::filesystem::path(file).stem().string();
    std::replace_if(
        name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
    return name;
  }
};

inline std::vector<Golden> AllGoldens() {
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

// A golden's tensors.
struct GoldenData {
  std::vector<uint32_t> prompt, greedy;
  std::vector<float> logits, gap;

  uint32_t tokens() const { return static_cast<uint32_t>(prompt.size() + greedy.size()); }
};

inline void ReadGolden(const Golden& golden, GoldenData* out) {
  auto file = SafetensorsFile::Open(golden.file);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto read = [&](const char* name, auto* to) {
    auto tensor = (*file)->Find(name);
    ASSERT_TRUE(tensor.ok()) << tensor.status();
    for (uint64_t i = 0; i < tensor->elements(); ++i) {
      to->push_back(static_cast<typename std::decay_t<decltype(*to)>::value_type>(tensor->at(i)));
    }
  };
  read("prompt", &out->prompt);
  read("greedy", &out->greedy);
  read("logits_last", &out->logits);
  read("gap", &out->gap);
}

// The rest of the prompt, then every greedy step.
inline void ExpectGolden(const GoldenData& golden, Sequence* sequence) {
  auto logits = sequence->Extend(std::span(golden.prompt).subspan(sequence->tokens()),
                                 Sequence::Role::kPrompt);
  ASSERT_TRUE(logits.ok()) << logits.status();
  ASSERT_EQ(logits->size(), golden.logits.size());
  float low = golden.logits[0], high = low, worst = 0;
  for (size_t i = 0; i < logits->size(); ++i) {
    low = std::min(low, golden.logits[i]);
    high = std::max(high, golden.logits[i]);
    worst = std::max(worst, std::abs((*logits)[i] - golden.logits[i]));
  }
  EXPECT_LE(worst, 1e-4f * (high - low)) << "range " << high - low;
  char share[32];
  std::snprintf(share, sizeof(share), "%.3g", worst / (high - low));
  ::testing::Test::RecordProperty("worst_over_range", share);

  Sampler sampler({});
  for (size_t i = 0; i < golden.greedy.size(); ++i) {
    const uint32_t token = sampler.Next(*logits);
    ASSERT_EQ(token, golden.greedy[i]) << "step " << i << ", the oracle's gap is " << golden.gap[i];
    if (i + 1 == golden.greedy.size()) break;
    logits = sequence->Extend(std::span(&token, 1), Sequence::Role::kBudgeted);
    ASSERT_TRUE(logits.ok()) << logits.status();
  }
}

}  // namespace quarry::testing
