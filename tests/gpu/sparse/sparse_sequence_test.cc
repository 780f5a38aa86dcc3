// Sequences whose prefill is sparse.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "gpu/sequence.h"
#include "gpu/sparse/sampled_layers.h"
#include "gpu/sparse/sparse_attention.h"
#include "tests/gpu/fake_service.h"
#include "tests/gpu/guarded_device.h"
#include "tests/gpu/watched_device.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::FakeService;

constexpr uint32_t kPrompt = 800;

std::string Tiny(const std::string& name) { return QUARRY_TEST_MODELS "/tiny/" + name; }

class SparseSequenceTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    auto model = Model::Load(Tiny(GetParam()), &device_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    tokens_ = MadeTokens(kPrompt + 20, model_->config().vocab, Seed());
    options_.kv_dtype = DType::kFp32;
    options_.window = {8, 16, false};
    options_.max_attend_rows = 40;
    // Two layers of four heads.
    sparse_ = {"tiny", 2, 4, {}};
    for (const Pattern& pattern :
         {Pattern(AShapePattern{20, 70}), Pattern(VerticalSlashPattern{40, 110}),
          Pattern(BlockSparsePattern{4}), Pattern(DensePattern{}), Pattern(BlockScoredPattern{0.9}),
          Pattern(AShapePattern{0, 1}), Pattern(VerticalSlashMassPattern{0.3, 1}),
          Pattern(VerticalSlashPattern{100, 0})}) {
      sparse_.patterns.push_back({pattern});
    }
  }
  std::unique_ptr<Sequence> Open(KvService* service, const PatternFile* patterns) {
    return OpenOn(*model_, device_, service, patterns);
  }
  std::unique_ptr<Sequence> OpenOn(const Model& model, Device& device, KvService* service,
                                   const PatternFile* patterns) {
    SequenceOptions options = options_;
    options.patterns = patterns;
    auto s = Sequence::Open(model, device, service, options, std::span(tokens_).first(kPrompt),
                            kPrompt + 100);
    EXPECT_TRUE(s.ok()) << s.status();
    return *std::move(s);
  }
  std::vector<float> Prefill(Sequence* s) {
    auto logits = s->Extend(std::span(tokens_).subspan(s->tokens(), kPrompt - s->tokens()),
                            Sequence::Role::kPrompt);
    EXPECT_TRUE(logits.ok()) << logits.status();
    return logits.ok() ? *std::move(logits) : std::vector<float>();
  }
  // The largest difference, by the spread of a.
  static double Difference(const std::vector<float>& a, const std::vector<float>& b) {
    EXPECT_EQ(a.size(), b.size());
    const auto [low, high] = std::minmax_element(a.begin(), a.end());
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(double{a[i]} - b[i]));
    return worst / (*high - *low);
  }

  testing::WatchedDevice device_;
  std::unique_ptr<Model> model_;
  std::vector<uint32_t> tokens_;
  SequenceOptions options_;
  PatternFile sparse_;
};

TEST_P(SparseSequenceTest, PatternsOfEverythingAreDense) {
  PatternFile all{"tiny", 2, 4, std::vector<HeadPattern>(8, {AShapePattern{0, kPrompt}})};
  const std::vector<float> dense = Prefill(Open(nullptr, nullptr).get());
  FakeService service;
  for (const uint32_t rows : {4096u, 200u}) {
    options_.prefill_rows = rows;
    EXPECT_LT(Difference(dense, Prefill(Open(nullptr, &all).get())), 1e-5);
    EXPECT_LT(Difference(dense, Prefill(Open(&service, &all).get())), 1e-5);
  }
}

// The queries and keys of the first layer are those of a dense run.
TEST_P(SparseSequenceTest, TheFirstLayerAttendsItsPatterns) {
  ThreadTeam team(2);
  std::vector<float> want(size_t{kPrompt} * 4 * model_->config().head_dim);
  tokens_.resize(kPrompt);
  // The tiny models store bf16 or fp32; this is what both runs keep K and V as.
  options_.kv_dtype = model_->config().dtype;
  ASSERT_TRUE(
      SampleLayers(*model_, device_, {tokens_, kPrompt + 100, 0}, [&](const SampledLayer& layer) {
        if (layer.layer > 0) return absl::OkStatus();
        const uint32_t last = kPrompt - kLastQueries;
        const size_t width = want.size() / kPrompt;
        const auto plans = PlanHeads({layer.kv,
                                      {0, kPrompt},
                                      std::span(sparse_.patterns).first(4),
                                      layer.q.data() + last * width},
                                     &team);
        const SparseIndex index = BuildIndex(plans, {layer.kv, 0, kPrompt, layer.q.data()}, &team);
        EXPECT_LT(index.Cost(), 4 * index.DenseHeadCost());
        std::vector<float> lse(kPrompt * 4);
        AttendSparse({layer.kv, &index, {}, layer.q.data(), want.data(), lse.data()}, &team);
        return absl::OkStatus();
      }).ok());
  for (const uint32_t rows : {4096u, 300u, 128u}) {
    options_.prefill_rows = rows;
    device_.seen.clear();
    FakeService service;
    Prefill(Open(&service, &sparse_).get());
    std::vector<float> got;
    for (const auto& seen : device_.seen) {
      if (got.size() == want.size()) break;
      EXPECT_EQ(seen.first_token % 128, 0u);
      got.insert(got.end(), seen.o.begin(), seen.o.end());
    }
    ASSERT_EQ(got.size(), want.size());
    // Products of fewer rows differ in their last bits, so that K and V may round to a neighbour in
    // 16 bits, and what ranks about equal may change places: not for the A-shape and the dense
    // head, which choose nothing.
    const uint32_t d = model_->config().head_dim;
    for (uint32_t h = 0; h < 4; ++h) {
      std::vector<float> a, b;
      for (size_t at = h * d; at < want.size(); at += size_t{4} * d) {
        a.insert(a.end(), &want[at], &want[at] + d);
        b.insert(b.end(), &got[at], &got[at] + d);
      }
      const double chunked = h == 1 || h == 2 ? 0.03 : 0.005;
      EXPECT_LT(Difference(a, b), rows < kPrompt ? chunked : 1e-4) << rows << " " << h;
    }
  }
}

TEST_P(SparseSequenceTest, IsApproximateAndTheSameWhereverItRuns) {
  const std::vector<float> dense = Prefill(Open(nullptr, nullptr).get());
  const std::vector<float> here = Prefill(Open(nullptr, &sparse_).get());
  EXPECT_GT(Difference(dense, here), 1e-4);
  FakeService service;
  EXPECT_LT(Difference(here, Prefill(Open(&service, &sparse_).get())), 1e-5);
  testing::GuardedDevice guarded;
  auto model = Model::Load(Tiny(GetParam()), &guarded);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_LT(Difference(here, Prefill(OpenOn(**model, guarded, &service, &sparse_).get())), 1e-5);
}

TEST_P(SparseSequenceTest, ContextsSayHowTheyWereComputed) {
  FakeService service;
  auto sequence = Open(&service, &sparse_);
  EXPECT_EQ(service.contexts.begin()->second.recipe, RecipeOf(sparse_));
  Prefill(sequence.get());
  const auto next = [&](uint32_t first) {
    return sequence->Extend(std::span(tokens_).subspan(first, 3), Sequence::Role::kBudgeted);
  };
  // Exact attention goes on in the same context, also after a fork.
  ASSERT_TRUE(next(kPrompt).ok());
  ASSERT_EQ(service.contexts.size(), 1u);
  EXPECT_EQ(service.contexts.begin()->second.recipe, RecipeOf(sparse_));
  auto fork = sequence->Fork();
  ASSERT_TRUE(fork.ok());
  for (const auto& [id, context] : service.contexts) {
    EXPECT_EQ(context.recipe, RecipeOf(sparse_)) << id;
  }
  PatternFile dense{"tiny", 2, 4, std::vector<HeadPattern>(8)};
  FakeService other;
  auto exact = Open(&other, &dense);
  EXPECT_TRUE(other.contexts.begin()->second.recipe.dense());
}

// A reused prefix is attended whole; row tiles begin behind it.
TEST_P(SparseSequenceTest, PrefillsBehindAReusedPrefix) {
  FakeService first, second;
  auto origin = Open(&first, nullptr);
  Prefill(origin.get());
  second.reuse = &first.contexts.begin()->second;
  second.reuse_tokens = 300;
  PatternFile all{"tiny", 2, 4, std::vector<HeadPattern>(8, {AShapePattern{0, kPrompt}})};
  const std::vector<float> dense = Prefill(Open(nullptr, nullptr).get());
  options_.prefill_rows = 150;
  EXPECT_LT(Difference(dense, Prefill(Open(&second, &all).get())), 1e-5);
  device_.seen.clear();
  Prefill(Open(&second, &sparse_).get());
  ASSERT_FALSE(device_.seen.empty());
  for (const auto& seen : device_.seen) EXPECT_EQ((seen.first_token - 300) % 128, 0u);
}

TEST_P(SparseSequenceTest, WhatDoesNotFitIsRefused) {
  const auto refused = [&](const PatternFile& patterns) {
    SequenceOptions options = options_;
    options.patterns = &patterns;
    return Sequence::Open(*model_, device_, nullptr, options, tokens_, kPrompt + 100).status();
  };
  EXPECT_TRUE(absl::IsInvalidArgument(refused({"other", 3, 4, std::vector<HeadPattern>(12)})));
  options_.prefill_rows = 100;
  EXPECT_TRUE(absl::IsInvalidArgument(refused(sparse_)));
}

INSTANTIATE_TEST_SUITE_P(TinyModels, SparseSequenceTest,
                         ::testing::Values("llama3-rope", "phi3-partial-rotary"));

TEST(SparseSlidingWindowTest, IsRefused) {
  auto device = MakeHostDevice({});
  auto model = Model::Load(Tiny("phi3-sliding-window"), device.get());
  ASSERT_TRUE(model.ok());
  PatternFile patterns{"m", 2, 2, std::vector<HeadPattern>(4, {AShapePattern{1, 1}})};
  SequenceOptions options;
  options.patterns = &patterns;
  const std::vector<uint32_t> tokens = {1, 2, 3};
  EXPECT_TRUE(absl::IsUnimplemented(
      Sequence::Open(**model, *device, nullptr, options, tokens, 10).status()));
}

}  // namespace
}  // namespace quarry
