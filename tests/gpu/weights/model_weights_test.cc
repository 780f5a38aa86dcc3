// Whole models with their weights elsewhere or in another form: streamed ones give what resident
// ones give, to the bit; codes give nearly that.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "gpu/model.h"
#include "gpu/weights/weight_store.h"
#include "gpu/working_bytes.h"
#include "tests/gpu/fake_service.h"
#include "tests/gpu/golden.h"
#include "tests/gpu/tiny_models.h"

namespace quarry {
namespace {

using testing::Golden;
using testing::GoldenData;

const std::string kTiny = QUARRY_TEST_MODELS "/tiny/";

struct Answers {
  std::vector<std::vector<float>> logits;  // behind the prompt, and by step
  std::vector<uint32_t> greedy;
  Residence residence;
  DeviceStats stats;
  uint64_t replayed = 0;  // steps
};

SequenceOptions Options() {
  SequenceOptions options;
  options.kv_dtype = DType::kFp32;
  options.prefill_rows = 16;
  options.window = {8, 16, false};
  return options;
}

// A prefill in chunks and greedy steps behind it.
Answers RunModel(const std::string& directory, const WeightOptions& weights, uint64_t capacity,
                 const std::vector<uint32_t>& prompt, uint32_t steps,
                 KvService* service = nullptr) {
  Answers out;
  const std::unique_ptr<Device> device = MakeHostDevice({.capacity_bytes = capacity, .threads = 2});
  auto model = Model::Load(directory, device.get(), weights);
  EXPECT_TRUE(model.ok()) << model.status();
  if (!model.ok()) return out;
  out.residence = (*model)->residence();
  auto sequence = Sequence::Open(**model, *device, service, Options(), prompt,
                                 static_cast<uint32_t>(prompt.size()) + steps);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  auto logits = (*sequence)->Extend(prompt, Sequence::Role::kPrompt);
  for (uint32_t i = 0; logits.ok() && i < steps; ++i) {
    out.logits.push_back(*logits);
    out.greedy.push_back(Sampler({}).Next(*logits));
    logits = (*sequence)->Extend(std::span(&out.greedy.back(), 1), Sequence::Role::kBudgeted);
  }
  EXPECT_TRUE(logits.ok()) << logits.status();
  out.stats = device->Stats();
  out.replayed = (*sequence)->replayed_steps();
  return out;
}

std::vector<uint32_t> Prompt(uint32_t n) {
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < n; ++i) out.push_back(1 + i * 37 % 60);
  return out;
}

class TinyModels : public ::testing::TestWithParam<const char*> {};

TEST_P(TinyModels, StreamedIsResidentToTheBit) {
  const uint64_t capacity = uint64_t{1} << 30;
  for (const WeightForm form : {WeightForm::kPlain, WeightForm::kInt8, WeightForm::kInt4}) {
    const Answers resident =
        RunModel(kTiny + GetParam(), {WeightMode::kResident, form}, capacity, Prompt(50), 6);
    const Answers streamed =
        RunModel(kTiny + GetParam(), {WeightMode::kStreamed, form}, capacity, Prompt(50), 6);
    EXPECT_EQ(resident.logits, streamed.logits);
    EXPECT_EQ(resident.residence.streamed_bytes, 0u);
    EXPECT_EQ(streamed.residence.resident_bytes, 0u);
    EXPECT_LT(streamed.stats.peak_bytes, resident.stats.peak_bytes);
  }
}

TEST_P(TinyModels, ABudgetBetweenTheTwoStreamsAPart) {
  const std::string model = kTiny + GetParam();
  const uint64_t plenty = uint64_t{1} << 30;
  const Answers all = RunModel(model, {}, plenty, Prompt(50), 3);
  ASSERT_EQ(all.residence.streamed_bytes, 0u);
  const uint64_t working = all.stats.peak_bytes - all.residence.device_bytes();
  // What is set aside for a sequence is enough; an operation of the host takes nothing.
  auto config = LoadModelConfig(model);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_LE(working, WorkingBytes(*config, Options(), 53, false) - kOperationBytes +
                         config->hidden * 4 + config->vocab * 4 + config->hidden * 4);
  const Answers streamed = RunModel(model, {WeightMode::kStreamed}, plenty, Prompt(50), 3);
  for (uint64_t weights = streamed.residence.device_bytes(); weights < all.residence.device_bytes();
       weights += all.residence.device_bytes() / 7) {
    WeightOptions options;
    options.reserve_bytes = working;
    const uint64_t capacity = weights + working + 4096;
    const Answers run = RunModel(model, options, capacity, Prompt(50), 3);
    EXPECT_EQ(run.logits, all.logits);
    // The embedding table goes first.
    EXPECT_LT(run.residence.device_bytes(), all.residence.device_bytes());
    EXPECT_LE(run.stats.peak_bytes, capacity);
  }
}

// They come while a prefill is, stay behind it, and go again for the next one.
TEST_P(TinyModels, StreamedWeightsStayInRoomThatAPrefillLeaves) {
  const std::string directory = kTiny + GetParam();
  constexpr uint32_t kSteps = 6;
  const auto config = LoadModelConfig(directory);
  ASSERT_TRUE(config.ok()) << config.status();
  const std::vector<uint32_t> prompt = Prompt(config->max_tokens - kSteps);
  testing::FakeService service;
  const Answers all = RunModel(directory, {}, uint64_t{1} << 30, prompt, kSteps, &service);
  // More of the weights fit beside a step than beside a prefill.
  const uint64_t working = all.stats.peak_bytes - all.residence.device_bytes();
  const Answers streamed =
      RunModel(directory, {WeightMode::kStreamed}, uint64_t{1} << 30, prompt, kSteps);
  WeightOptions options;
  options.reserve_bytes = working + 16384;  // forks of the daemon's side have windows twice
  options.leave_free_bytes = 1024;
  const uint64_t capacity = streamed.residence.device_bytes() + options.reserve_bytes + 4096;
  const std::unique_ptr<Device> device = MakeHostDevice({.capacity_bytes = capacity, .threads = 2});
  auto loaded = Model::Load(directory, device.get(), options);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Model& model = **loaded;
  ASSERT_GT(model.residence().streamed_bytes, 0u);
  for (int i = 0; i < 3; ++i) {
    auto opened = Sequence::Open(model, *device, &service, Options(), prompt, config->max_tokens);
    ASSERT_TRUE(opened.ok()) << opened.status();
    Sequence& sequence = **opened;
    auto logits = sequence.Extend(prompt, Sequence::Role::kPrompt);
    const uint64_t behind_prefill = model.weight_moves();
    uint64_t before_last = 0;
    for (uint32_t step = 0; step < kSteps; ++step) {
      ASSERT_TRUE(logits.ok()) << logits.status();
      EXPECT_EQ(*logits, all.logits[step]) << "sequence " << i << ", step " << step;
      before_last = model.weight_moves();
      logits = sequence.Extend(std::span(&all.greedy[step], 1), Sequence::Role::kBudgeted);
    }
    ASSERT_TRUE(logits.ok()) << logits.status();
    EXPECT_GT(model.weight_moves(), behind_prefill);
    EXPECT_EQ(model.weight_moves(), before_last);
    EXPECT_GT(model.spare_weight_bytes(), 0u);
    EXPECT_LE(device->Stats().peak_bytes, capacity);
  }
}

TEST_P(TinyModels, StepsAreRecordedOnceAllStreamedWeightsStay) {
  const std::string directory = kTiny + GetParam();
  const std::vector<uint32_t> prompt = Prompt(50);
  constexpr uint32_t kSteps = 6;
  const Answers all = RunModel(directory, {}, uint64_t{1} << 30, prompt, kSteps);
  const Answers streamed =
      RunModel(directory, {WeightMode::kStreamed}, uint64_t{1} << 30, prompt, kSteps);
  EXPECT_EQ(streamed.replayed, 0u);
  // Room for all, planned for other things.
  WeightOptions options;
  options.reserve_bytes = all.stats.peak_bytes;
  const uint64_t capacity = streamed.residence.device_bytes() + options.reserve_bytes;
  const Answers spare = RunModel(directory, options, capacity, prompt, kSteps);
  EXPECT_GT(spare.residence.streamed_bytes, 0u);
  EXPECT_EQ(spare.logits, all.logits);
  EXPECT_EQ(spare.replayed, all.replayed);
  EXPECT_GT(spare.replayed, 0u);
  // None where they are to leave everything free.
  options.leave_free_bytes = capacity;
  EXPECT_EQ(RunModel(directory, options, capacity, prompt, kSteps).replayed, 0u);
}

INSTANTIATE_TEST_SUITE_P(Models, TinyModels,
                         ::testing::Values("llama-untied-mha", "llama3-rope", "phi3-partial-rotary",
                                           "phi3-sliding-window"),
                         TinyModelName);

TEST(ModelWeightsTest, WhatDoesNotFitIsRefusedWithItsBytes) {
  const std::string model = kTiny + "llama3-rope";
  const auto load = [&](WeightMode mode, uint64_t capacity) {
    const std::unique_ptr<Device> device = MakeHostDevice({capacity, 1});
    return Model::Load(model, device.get(), {mode}).status();
  };
  for (const WeightMode mode : {WeightMode::kResident, WeightMode::kStreamed, WeightMode::kAuto}) {
    const absl::Status status = load(mode, 20000);
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    EXPECT_NE(std::string(status.message()).find("are free of a budget of 20000"),
              std::string::npos)
        << status;
  }
}

TEST(ModelWeightsTest, CodesAreOtherWeights) {
  const std::unique_ptr<Device> device = MakeHostDevice({});
  std::vector<WeightsDigest> digests;
  for (const WeightForm form : {WeightForm::kPlain, WeightForm::kInt8, WeightForm::kInt4}) {
    auto model = Model::Load(kTiny + "llama3-rope", device.get(), {WeightMode::kAuto, form});
    ASSERT_TRUE(model.ok()) << model.status();
    digests.push_back((*model)->SpecFor(64, DType::kBf16)->weights);
  }
  EXPECT_NE(digests[0], digests[1]);
  EXPECT_NE(digests[0], digests[2]);
  EXPECT_NE(digests[1], digests[2]);
}

// The trained models: errors of logits in shares of their range, and the oracle's greedy tokens
// where its two best are farther apart than that.
class CodedModels : public ::testing::TestWithParam<Golden> {};

TEST_P(CodedModels, AnswersAreNearlyThoseOfFullWeights) {
  GoldenData golden;
  ASSERT_NO_FATAL_FAILURE(testing::ReadGolden(GetParam(), &golden));
  for (const auto& [form, limit] :
       {std::pair{WeightForm::kInt8, 0.02f}, {WeightForm::kInt4, 0.2f}}) {
    const std::unique_ptr<Device> device = MakeHostDevice({});
    auto model = Model::Load(GetParam().model, device.get(), {WeightMode::kAuto, form});
    ASSERT_TRUE(model.ok()) << model.status();
    SequenceOptions options;
    options.kv_dtype = DType::kFp32;
    auto sequence =
        Sequence::Open(**model, *device, nullptr, options, golden.prompt, golden.tokens());
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    auto logits = (*sequence)->Extend(golden.prompt, Sequence::Role::kPrompt);
    ASSERT_TRUE(logits.ok()) << logits.status();
    const auto [low, high] = std::minmax_element(golden.logits.begin(), golden.logits.end());
    const float range = *high - *low;
    float worst = 0;
    for (size_t i = 0; i < logits->size(); ++i) {
      worst = std::max(worst, std::abs((*logits)[i] - golden.logits[i]));
    }
    EXPECT_LE(worst, limit * range);
    size_t same = 0;
    const size_t steps = std::min<size_t>(golden.greedy.size(), 20);
    for (size_t i = 0; i < steps; ++i) {
      const uint32_t token = Sampler({}).Next(*logits);
      same += token == golden.greedy[i];
      if (form == WeightForm::kInt8 && golden.gap[i] > 2 * limit * range) {
        EXPECT_EQ(token, golden.greedy[i]) << "step " << i << ", a gap of " << golden.gap[i];
      }
      if (i + 1 == steps) break;
      logits = (*sequence)->Extend(std::span(&golden.greedy[i], 1), Sequence::Role::kBudgeted);
      ASSERT_TRUE(logits.ok()) << logits.status();
    }
    std::printf("%s: error %.4f of the range, %zu of %zu greedy tokens\n",
                std::string(WeightFormName(form)).c_str(), worst / range, same, steps);
  }
}

std::vector<Golden> Trained() {
  std::vector<Golden> out;
  for (const Golden& golden : testing::AllGoldens()) {
    const bool tiny = golden.model.find("/tiny/") != std::string::npos;
    const std::string name = golden.Name();
    // Prompts of up to 300 tokens: longer ones take minutes and show nothing else.
    if (!tiny && (name.ends_with("n1") || name.ends_with("n17") || name.ends_with("n300"))) {
      out.push_back(golden);
    }
  }
  return out;
}

INSTANTIATE_TEST_SUITE_P(Files, CodedModels, ::testing::ValuesIn(Trained()),
                         [](const auto& info) { return info.param.Name(); });

}  // namespace
}  // namespace quarry
