// The worker with its K/V in a service: a fake one here, which keeps every token and can fail.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "gpu/sampler.h"
#include "gpu/sequence.h"
#include "proto/half.h"

namespace quarry {
namespace {

// Keeps contexts in plain memory and attends in double. Fails where it is told to.
class FakeService final : public KvService {
 public:
  struct Context {
    KvShape shape;
    NumericRecipe recipe;
    uint32_t max_tokens = 0;
    std::vector<uint32_t> ids;
    std::vector<std::vector<std::byte>> k, v;  // per layer, [token][kv_head][head_dim]
  };

  absl::StatusOr<OpenResult> Open(const OpenRequest& r) override {
    Context c{r.spec.shape, r.recipe, r.max_tokens, r.tokens, {}, {}};
    c.k.resize(c.shape.layers);
    c.v.resize(c.shape.layers);
    OpenResult out;
    out.context = {++last_};
    if (reuse != nullptr) {
      const size_t token = TokenBytes(c);
      out.reused_tokens = reuse_tokens;
      for (uint32_t l = 0; l < c.shape.layers; ++l) {
        c.k[l].assign(reuse->k[l].begin(), reuse->k[l].begin() + reuse_tokens * token);
        c.v[l].assign(reuse->v[l].begin(), reuse->v[l].begin() + reuse_tokens * token);
      }
    }
    contexts[last_] = std::move(c);
    return out;
  }
  absl::Status Append(const AppendRequest& r) override {
    Context& c = contexts.at(r.context.value);
    const size_t token = TokenBytes(c);
    EXPECT_EQ(c.k[r.layer].size(), r.range.lo * token);
    Add(&c.k[r.layer], r.k, r.range.size() * token);
    Add(&c.v[r.layer], r.v, r.range.size() * token);
    samples += r.query_positions.size();
    return absl::OkStatus();
  }
  absl::StatusOr<ContextId> Fork(const ForkRequest& r) override {
    Context c = contexts.at(r.context.value);
    c.recipe = r.recipe;
    for (auto* part : {&c.k, &c.v}) {
      for (auto& layer : *part) layer.resize(std::min(layer.size(), r.tokens * TokenBytes(c)));
    }
    c.ids.resize(std::min<size_t>(c.ids.size(), r.tokens));
    contexts[++last_] = std::move(c);
    return ContextId{last_};
  }
  absl::Status DeclareTokens(ContextId id, std::span<const uint32_t> ids) override {
    auto& known = contexts.at(id.value).ids;
    known.insert(known.end(), ids.begin(), ids.end());
    return absl::OkStatus();
  }
  absl::Status Close(ContextId id) override {
    return contexts.erase(id.value) == 1 ? absl::OkStatus() : absl::NotFoundError("closed twice");
  }
  absl::Status Read(ContextId id, uint32_t layer, TokenRange range, std::span<std::byte> k,
                    std::span<std::byte> v) override {
    const Context& c = contexts.at(id.value);
    std::memcpy(k.data(), c.k[layer].data() + range.lo * TokenBytes(c), k.size());
    std::memcpy(v.data(), c.v[layer].data() + range.lo * TokenBytes(c), v.size());
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<PendingAttend>> Attend(std::span<const AttendRow> rows,
                                                        std::span<AttendAnswer> answers) override;
  void Arm(bool armed) override { armed_balance += armed ? 1 : -1; }
  absl::StatusOr<uint64_t> HeldBytes(ContextId) override { return 0; }

  static size_t TokenBytes(const Context& c) { return c.shape.kv_heads * c.shape.vector_bytes(); }

  std::map<uint64_t, Context> contexts;
  const Context* reuse = nullptr;
  uint32_t reuse_tokens = 0;
  size_t samples = 0;
  int armed_balance = 0;
  int attends = 0;
  int fail_attend = -1;  // the attend that fails,
  absl::Status failure;  // as a whole if Unavailable, else in its first row
  uint64_t tokens_attended = 0;

 private:
  static void Add(std::vector<std::byte>* out, const void* data, size_t bytes) {
    const auto* p = static_cast<const std::byte*>(data);
    out->insert(out->end(), p, p + bytes);
  }
  uint64_t last_ = 0;
};

absl::StatusOr<std::unique_ptr<PendingAttend>> FakeService::Attend(
    std::span<const AttendRow> rows, std::span<AttendAnswer> answers) {
  class Ready final : public PendingAttend {
   public:
    explicit Ready(absl::Status status) : status_(std::move(status)) {}
    bool Done() const override { return true; }
    absl::Status Wait() override { return status_; }

   private:
    const absl::Status status_;
  };
  const bool fails = attends++ == fail_attend;
  if (fails && absl::IsUnavailable(failure)) return std::make_unique<Ready>(failure);
  for (size_t i = 0; i < rows.size(); ++i) {
    const AttendRow& row = rows[i];
    Context& c = contexts.at(row.context.value);
    EXPECT_LT(row.token_position, c.max_tokens);
    EXPECT_EQ(c.k[row.layer].size(), row.token_position * TokenBytes(c)) << "layer " << row.layer;
    Add(&c.k[row.layer], row.k, TokenBytes(c));
    Add(&c.v[row.layer], row.v, TokenBytes(c));
    answers[i].status = fails && i == 0 ? failure : absl::OkStatus();
    answers[i].covered = row.range;
    const uint32_t d = c.shape.head_dim;
    for (uint32_t h = 0; h < row.heads; ++h) {
      const uint32_t kv = h / c.shape.group();
      std::vector<double> z, o(d, 0.0);
      double largest = -1e300, sum = 0;
      for (uint32_t t = row.range.lo; t < row.range.hi; ++t) {
        double dot = 0;
        for (uint32_t j = 0; j < d; ++j) {
          dot += double{static_cast<const float*>(row.q)[h * d + j]} *
                 LoadAsFloat(c.k[row.layer].data(), (size_t{t} * c.shape.kv_heads + kv) * d + j,
                             c.shape.dtype);
        }
        z.push_back(dot / std::sqrt(double{1} * d));
        largest = std::max(largest, z.back());
      }
      for (uint32_t t = row.range.lo; t < row.range.hi; ++t) {
        const double w = std::exp(z[t - row.range.lo] - largest);
        sum += w;
        for (uint32_t j = 0; j < d; ++j) {
          o[j] += w * LoadAsFloat(c.v[row.layer].data(),
                                  (size_t{t} * c.shape.kv_heads + kv) * d + j, c.shape.dtype);
        }
      }
      for (uint32_t j = 0; j < d; ++j) {
        answers[i].o[h * d + j] = sum > 0 ? static_cast<float>(o[j] / sum) : 0.0f;
      }
      answers[i].lse[h] = sum > 0 ? static_cast<float>(largest + std::log(sum)) : kEmptyLse;
    }
    answers[i].tokens_attended = uint64_t{row.range.size()} * row.heads;
    tokens_attended += answers[i].tokens_attended;
  }
  return std::make_unique<Ready>(absl::OkStatus());
}

class SequenceTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    device_ = MakeHostDevice({});
    auto model =
        Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/" + GetParam(), device_.get());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    uint32_t x = 7;
    for (int i = 0; i < 200; ++i) {
      x = x * 1664525 + 1013904223;
      tokens_.push_back((x >> 8) % model_->config().vocab);
    }
    options_.kv_dtype = DType::kFp32;
    options_.window = {8, 16, false};
    options_.max_attend_rows = 40;
    options_.rows_per_message = 7;
  }
  std::unique_ptr<Sequence> Open(KvService* service, size_t prompt = 100) {
    auto s =
        Sequence::Open(*model_, *device_, service, options_, std::span(tokens_).first(prompt), 256);
    EXPECT_TRUE(s.ok()) << s.status();
    return *std::move(s);
  }
  // Logits after every step of: a prefill of 100, a chunk of 30, 20 single tokens.
  std::vector<std::vector<float>> Run(Sequence* s) {
    std::vector<std::vector<float>> out;
    const auto step = [&](uint32_t lo, uint32_t hi, Sequence::Role role) {
      auto logits = s->Extend(std::span(tokens_).subspan(lo, hi - lo), role);
      ASSERT_TRUE(logits.ok()) << logits.status() << " at " << lo;
      out.push_back(*std::move(logits));
    };
    step(s->tokens(), 100, Sequence::Role::kPrompt);
    step(100, 130, Sequence::Role::kBudgeted);
    for (uint32_t t = 130; t < 150; ++t) step(t, t + 1, Sequence::Role::kBudgeted);
    return out;
  }
  static void ExpectSame(const std::vector<std::vector<float>>& a,
                         const std::vector<std::vector<float>>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      float low = 1e30f, high = -1e30f, worst = 0;
      for (size_t j = 0; j < a[i].size(); ++j) {
        low = std::min(low, a[i][j]);
        high = std::max(high, a[i][j]);
        worst = std::max(worst, std::abs(a[i][j] - b[i][j]));
      }
      EXPECT_LE(worst, 1e-5f * (high - low) + 1e-6f) << "step " << i;
    }
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Model> model_;
  std::vector<uint32_t> tokens_;
  SequenceOptions options_;
};

TEST_P(SequenceTest, ServiceWithUnlimitedBudgetEqualsFullAttention) {
  auto full = Run(Open(nullptr).get());
  FakeService service;
  {
    auto sequence = Open(&service);
    ExpectSame(full, Run(sequence.get()));
    EXPECT_EQ(sequence->cost().tokens_local + sequence->cost().tokens_daemon,
              sequence->cost().tokens_in_reach)
        << "every token counts exactly once";
    EXPECT_GT(service.samples, 0u);
    EXPECT_EQ(service.armed_balance, 0);
  }
  EXPECT_TRUE(service.contexts.empty()) << "the context was not closed";
}

TEST_P(SequenceTest, ReusedPrefixGivesTheSameTokens) {
  auto full = Run(Open(nullptr).get());
  FakeService first, second;
  auto origin = Open(&first);
  ASSERT_TRUE(origin->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  second.reuse = &first.contexts.begin()->second;
  // A suffix short enough to attend by rows, one that streams the prefix, and no overlap at all
  // between prefix and window.
  for (uint32_t reused : {96u, 40u, 5u}) {
    second.reuse_tokens = reused;
    auto sequence = Open(&second);
    EXPECT_EQ(sequence->reused_tokens(), reused);
    ExpectSame(full, Run(sequence.get()));
  }
}

TEST_P(SequenceTest, VoidedTokenIsComputedAgain) {
  auto full = Run(Open(nullptr).get());
  for (int at : {0, 3, 11, 14}) {
    FakeService service;
    service.fail_attend = at;
    service.failure = absl::ResourceExhaustedError("queue full");
    auto sequence = Open(&service);
    ExpectSame(full, Run(sequence.get()));
    EXPECT_EQ(sequence->cost().recoveries, 1u);
    EXPECT_EQ(service.armed_balance, 0);
  }
}

TEST_P(SequenceTest, LostDaemonFailsTheRequestAndStaysFailed) {
  FakeService service;
  service.fail_attend = 4;
  service.failure = absl::UnavailableError("gone");
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  auto logits = sequence->Extend(std::span(tokens_).subspan(100, 30), Sequence::Role::kBudgeted);
  EXPECT_TRUE(absl::IsUnavailable(logits.status())) << logits.status();
  EXPECT_NE(std::string(logits.status().message()).find("void"), std::string::npos);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      sequence->Extend(std::span(tokens_).subspan(100, 1), Sequence::Role::kBudgeted).status()));
}

TEST_P(SequenceTest, ForksGoOnIndependently) {
  FakeService service;
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  auto fork = sequence->Fork();
  ASSERT_TRUE(fork.ok()) << fork.status();
  const auto next = std::span(tokens_).subspan(100, 30);
  auto a = (*fork)->Extend(next, Sequence::Role::kBudgeted);
  auto other = (*fork)->Extend(std::span(tokens_).subspan(5, 9), Sequence::Role::kBudgeted);
  auto b = sequence->Extend(next, Sequence::Role::kBudgeted);
  ASSERT_TRUE(a.ok() && b.ok() && other.ok());
  EXPECT_EQ(*a, *b);
}

TEST_P(SequenceTest, BudgetedTokensGoToAContextOfTheirRecipe) {
  options_.budget.share = 0.25;
  FakeService service;
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  EXPECT_TRUE(service.contexts.begin()->second.recipe.dense());
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).subspan(100, 3), Sequence::Role::kBudgeted).ok());
  ASSERT_EQ(service.contexts.size(), 1u);
  EXPECT_FALSE(service.contexts.begin()->second.recipe.dense());
}

TEST_P(SequenceTest, BadTokensAndLengthsAreNamed) {
  FakeService service;
  auto sequence = Open(&service);
  const uint32_t vocab = model_->config().vocab;
  std::vector<uint32_t> bad = {1, 2, vocab};
  absl::Status status = sequence->Extend(bad, Sequence::Role::kPrompt).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_NE(std::string(status.message()).find(std::to_string(vocab)), std::string::npos);
  EXPECT_NE(std::string(status.message()).find("token 2"), std::string::npos) << status;
  std::vector<uint32_t> many(300, 1);
  status = sequence->Extend(many, Sequence::Role::kPrompt).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_NE(std::string(status.message()).find("256"), std::string::npos) << status;
  EXPECT_TRUE(absl::IsFailedPrecondition(
      Sequence::Open(*model_, *device_, &service, options_, {}, 1u << 30).status()));
}

INSTANTIATE_TEST_SUITE_P(Models, SequenceTest,
                         ::testing::Values("llama-untied-mha", "llama3-rope", "phi3-partial-rotary",
                                           "phi3-sliding-window"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(SamplerTest, GreedyTopPAndSeedsBehave) {
  std::vector<float> logits = {0.0f, 5.0f, 4.9f, -3.0f};
  EXPECT_EQ(Sampler({}).Next(logits), 1u);
  std::vector<int> counts(4);
  Sampler sampler({.temperature = 1.0, .top_p = 0.9, .seed = 3});
  for (int i = 0; i < 1000; ++i) ++counts[sampler.Next(logits)];
  EXPECT_GT(counts[1], 400);
  EXPECT_GT(counts[2], 350);
  EXPECT_EQ(counts[0] + counts[3], 0);
  Sampler a({.temperature = 2.0, .top_p = 1, .seed = 9}),
      b({.temperature = 2.0, .top_p = 1, .seed = 9});
  for (int i = 0; i < 50; ++i) EXPECT_EQ(a.Next(logits), b.Next(logits));
}

}  // namespace
}  // namespace quarry
