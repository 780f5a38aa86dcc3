// Budgets span the whole query, and every token counts once, whatever runs it lies in.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "tests/daemon/uniform_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kWindowFirst = 128, kWindowLast = 512;

Budget FixedK(uint32_t k) { return {Budget::Kind::kFixedK, k, 1.0f}; }
Budget TopP(float mass, uint32_t k = 0) { return {Budget::Kind::kTopP, k, mass}; }

using EngineBudgetTest = EngineTest;

TEST_F(EngineBudgetTest, TheSameTokensInFewOrManyRunsGiveTheSameAnswer) {
  const KvShape shape = {.layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 32};
  constexpr uint32_t kTokens = 33000;
  const KvData data(shape, kTokens, Seed());
  std::vector<std::unique_ptr<OwnedRow>> first;
  for (const uint32_t run_tokens : {1u << 20, 32768u, 2048u, 256u}) {
    SCOPED_TRACE(run_tokens);
    EngineOptions options = SmallOptions();
    options.run_tokens = run_tokens;
    Start(options);
    const OpenResult opened =
        OpenAndFill(session_, OpenFor(SmallModel(shape), Tokens(kTokens), kTokens), data);
    ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
    const uint32_t published = kTokens / kBlockTokens * kBlockTokens;
    WaitForRuns((published - kWindowFirst) / run_tokens);
    std::vector<std::unique_ptr<OwnedRow>> rows;
    for (const Budget& budget :
         {FixedK(100), FixedK(5000), TopP(0.5f), TopP(0.95f), TopP(0.95f, 64),
          Budget{.kind = Budget::Kind::kDipr, .beta = 1.5f},
          Budget{.kind = Budget::Kind::kDipr, .k = 20, .beta = 1.5f},
          Budget{.kind = Budget::Kind::kSoftmaxLift, .k = 300, .seed = 5},
          Budget{.kind = Budget::Kind::kError, .error = 0.1f}}) {
      rows.push_back(std::make_unique<OwnedRow>(
          shape, opened.context, 0, TokenRange{kWindowFirst, kTokens - kWindowLast}, Seed()));
      rows.back()->row.budget = budget;
    }
    AttendRows(*engine_, session_, rows);
    for (size_t i = 0; i < rows.size(); ++i) {
      SCOPED_TRACE(i);
      ASSERT_TRUE(rows[i]->answer.status.ok()) << rows[i]->answer.status;
      if (first.size() <= i) continue;
      EXPECT_EQ(rows[i]->answer.tokens_attended, first[i]->answer.tokens_attended);
      EXPECT_NEAR(rows[i]->answer.error_estimate, first[i]->answer.error_estimate, 1e-5);
      for (size_t j = 0; j < rows[i]->o.size(); ++j) {
        ASSERT_NEAR(rows[i]->o[j], first[i]->o[j], 1e-5);
      }
      for (size_t h = 0; h < rows[i]->lse.size(); ++h) {
        ASSERT_NEAR(rows[i]->lse[h], first[i]->lse[h], 1e-5);
      }
    }
    if (first.empty()) first = std::move(rows);
  }
}

TEST_F(EngineBudgetTest, AFixedBudgetAttendsTheBestTokensAndEstimatesWhatItLeft) {
  Start();
  constexpr uint32_t kTokens = 4000, kBudget = 50;
  const KvShape shape = SmallShape(DType::kFp32);
  const KvData data(shape, kTokens, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape), Tokens(kTokens), kTokens), data);
  ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
  const TokenRange range{kWindowFirst, kTokens - kWindowLast};
  const auto row =
      AttendOne(*engine_, session_, shape, opened.context, 1, range, Seed(), FixedK(kBudget));
  ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
  EXPECT_EQ(row->answer.tokens_attended, uint64_t{kBudget} * shape.heads);
  const TopKAnswer top = engine_->TopK(session_, row->row, kBudget, false);
  ASSERT_TRUE(top.status.ok());
  double worst_lost = 0;
  for (uint32_t h = 0; h < shape.heads; ++h) {
    std::vector<bool> best(kTokens);
    for (const TopKEntry& entry : top.heads[h]) best[entry.token] = true;
    const float* const q = row->q.data() + h * shape.head_dim;
    const ReferenceHead wanted =
        ReferenceAttention(data, 1, range, q, h, [&](uint32_t t) { return best[t]; });
    const ReferenceHead all =
        ReferenceAttention(data, 1, range, q, h, [](uint32_t) { return true; });
    EXPECT_NEAR(row->lse[h], wanted.lse, 1e-4);
    for (uint32_t d = 0; d < shape.head_dim; ++d) {
      EXPECT_NEAR(row->o[h * shape.head_dim + d], wanted.o[d], 1e-4);
    }
    worst_lost = std::max(worst_lost, 1 - std::exp(wanted.lse - all.lse));
  }
  EXPECT_NEAR(row->answer.error_estimate, worst_lost, 1e-4);
}

TEST_F(EngineBudgetTest, WithoutAnIndexAToleratedErrorIsAnsweredExactly) {
  Start(SmallOptions());
  const KvShape shape = SmallShape();
  const KvData data(shape, 2000, Seed());
  const OpenResult opened = OpenAndFill(session_, OpenFor(SmallModel(shape), Tokens(2000), 2000),
                                        data);
  const auto row = AttendOne(*engine_, session_, shape, opened.context, 1, {100, 1900}, 1,
                             {.kind = Budget::Kind::kError, .error = 0.5f});
  ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
  EXPECT_EQ(row->answer.tokens_attended, uint64_t{1800} * shape.heads);
  EXPECT_EQ(row->answer.error_estimate, 0);
  EXPECT_LE(WorstError(data, *row), 1e-3);
}

// Means of many draws are the exact attention; the same draw gives the same answer, the next
// position another one.
TEST_F(EngineBudgetTest, ASampledAnswerIsUnbiasedAndFollowsFromItsSeedAndPosition) {
  Start(SmallOptions());
  const KvShape shape = SmallShape();
  constexpr uint32_t kTokens = 2000, kDraws = 400;
  const KvData data(shape, kTokens, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape), Tokens(kTokens), kTokens), data);
  const auto ask = [&](Budget budget, uint32_t position) {
    std::unique_ptr<OwnedRow> rows[1] = {std::make_unique<OwnedRow>(
        shape, opened.context, 1, TokenRange{0, kTokens}, Seed())};
    rows[0]->row.budget = budget;
    rows[0]->row.token_position = position;
    AttendRows(*engine_, session_, rows);
    EXPECT_TRUE(rows[0]->answer.status.ok()) << rows[0]->answer.status;
    return std::move(rows[0]);
  };
  const auto exact = ask({}, 0);
  Budget lift{.kind = Budget::Kind::kSoftmaxLift, .k = 200};
  const auto first = ask(lift, 1), again = ask(lift, 1), next = ask(lift, 2);
  const auto furthest = [](const std::vector<float>& a, const std::vector<float>& b) {
    float most = 0;
    for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(a[i] - b[i]));
    return most;
  };
  // Not to the bit: blocks published in between are other units to merge.
  EXPECT_LT(furthest(first->o, again->o), 1e-5f);
  EXPECT_GT(furthest(first->o, next->o), 1e-3f);
  EXPECT_EQ(first->answer.tokens_attended, uint64_t{200} * shape.heads);
  EXPECT_GT(first->answer.error_estimate, 0);
  EXPECT_LT(first->answer.error_estimate, 0.15);  // 1 / sqrt(k), and some room
  std::vector<double> mean(shape.heads), square(shape.heads);
  for (lift.seed = 0; lift.seed < kDraws; ++lift.seed) {
    const auto drawn = ask(lift, 1);
    for (uint32_t h = 0; h < shape.heads; ++h) {
      const double ratio = std::exp(double{drawn->lse[h]} - exact->lse[h]);
      mean[h] += ratio / kDraws;
      square[h] += (ratio - 1) * (ratio - 1) / kDraws;
    }
  }
  for (uint32_t h = 0; h < shape.heads; ++h) {
    EXPECT_NEAR(mean[h], 1, 5 * std::sqrt(square[h] / kDraws) + 1e-4) << "head " << h;
  }
}

TEST_F(EngineBudgetTest, ABudgetThatHoldsEverythingIsExact) {
  Start();
  const UniformSequence sequence(2000, Seed());
  const OpenResult opened = OpenAndFill(
      session_, OpenFor(SmallModel(UniformSequence::Shape()), Tokens(2000), 2000), sequence.data());
  for (const Budget& budget : {FixedK(2000), FixedK(~0u), TopP(1.0f), TopP(1.0f, 2000)}) {
    const auto row = AttendOne(*engine_, session_, UniformSequence::Shape(), opened.context, 0,
                               {0, 2000}, 1, budget);
    ASSERT_TRUE(row->answer.status.ok());
    EXPECT_TRUE(sequence.IsMeanOfFirst(*row, 2000));
    EXPECT_EQ(row->answer.error_estimate, 0);
  }
}

TEST_F(EngineBudgetTest, TiesGoToTheLowestTokensAlsoAroundARunThatAForkCut) {
  EngineOptions options = SmallOptions();
  options.run_tokens = 512;  // [128, 640), which the fork keeps up to token 400
  Start(options);
  const UniformSequence sequence(1000, Seed());
  const UniformSequence other(1000, Seed() + 1);
  const OpenResult opened = OpenAndFill(
      session_, OpenFor(SmallModel(UniformSequence::Shape()), Tokens(1000), 1000), sequence.data());
  ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
  WaitForRuns(1);
  auto fork = engine_->Fork(session_, {opened.context, 400, 1000, {}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  ASSERT_OK(AppendAll(*engine_, session_, *fork, other.data(), {400, 1000}));
  for (const uint32_t k : {1u, 127u, 128u, 129u, 399u, 400u, 401u, 450u, 511u, 513u, 999u}) {
    const auto row =
        AttendOne(*engine_, session_, UniformSequence::Shape(), *fork, 0, {0, 1000}, 1, FixedK(k));
    ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
    EXPECT_TRUE(sequence.IsMeanOfFirst(*row, k, 400, &other)) << k;
  }
}

// Contexts grow, fork and are sealed while others attend: the window slides, the background
// publishes and swaps runs in, and each answer counts each token once.
TEST_F(EngineBudgetTest, EveryTokenCountsOnceDuringForkSlideAndSwap) {
  EngineOptions options = SmallOptions();
  options.run_tokens = 512;
  Start(options);
  constexpr uint32_t kTokens = 8000;
  const UniformSequence sequence(kTokens, Seed());
  const UniformSequence other(kTokens, Seed() + 1);  // what forks go on with
  const ModelSpec model = SmallModel(UniformSequence::Shape());
  auto opened = engine_->Open(session_, OpenFor(model, Tokens(kTokens), kTokens));
  ASSERT_TRUE(opened.ok()) << opened.status();
  std::atomic<uint32_t> stored{0};
  std::thread writer([&] {
    std::mt19937_64 random(Seed());
    for (uint32_t t = 0; t < kTokens;) {
      const uint32_t next = std::min<uint32_t>(kTokens, t + 1 + random() % 200);
      ASSERT_OK(AppendAll(*engine_, session_, opened->context, sequence.data(), {t, next}));
      t = next;
      stored.store(t, std::memory_order_release);
    }
  });
  std::atomic<uint64_t> answers{0};
  const auto attend = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    ContextId fork{};
    uint32_t fork_at = 0, fork_tokens = 0;
    const absl::Time end = absl::Now() + testing::kPatience;
    const auto swapped = [&] { return engine_->Stats().runs_made > 0 || absl::Now() > end; };
    while (stored.load(std::memory_order_acquire) < kTokens || answers.load() < 400 || !swapped()) {
      const uint32_t tokens = stored.load(std::memory_order_acquire);
      if (tokens > 0 && random() % 8 == 0) {
        if (fork.value != 0) EXPECT_OK(engine_->Close(session_, fork));
        const auto at = static_cast<uint32_t>(random() % tokens + 1);
        auto forked = engine_->Fork(session_, {opened->context, at, kTokens, {}});
        ASSERT_TRUE(forked.ok()) << forked.status();
        fork = *forked;
        fork_tokens = std::min<uint32_t>(kTokens, at + random() % 3000);
        fork_at = at;
        const std::vector<uint32_t> ids = Tokens(fork_tokens - at, 1000000 + at);
        ASSERT_OK(engine_->DeclareTokens(session_, fork, ids));
        ASSERT_OK(AppendAll(*engine_, session_, fork, other.data(), {at, fork_tokens}));
      }
      std::vector<std::unique_ptr<OwnedRow>> rows;
      for (int i = 0; i < 4; ++i) {
        const bool forked = fork.value != 0 && random() % 2 == 0;
        const uint32_t available = forked ? fork_tokens : tokens;
        TokenRange range{kWindowFirst, available > kWindowLast ? available - kWindowLast : 0};
        if (random() % 2 == 0) {
          range.hi = static_cast<uint32_t>(random() % (available + 1));
          range.lo = static_cast<uint32_t>(random() % (range.hi + 1));
        }
        if (range.lo > range.hi) range.lo = range.hi;
        rows.push_back(std::make_unique<OwnedRow>(
            UniformSequence::Shape(), forked ? fork : opened->context, 0, range, random()));
        if (random() % 4 != 0) rows.back()->row.budget = FixedK(1 + random() % 4000);
      }
      AttendRows(*engine_, session_, rows);
      for (const auto& row : rows) {
        ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
        uint32_t count = row->row.range.size();
        if (row->row.budget.kind == Budget::Kind::kFixedK) {
          count = std::min(count, row->row.budget.k);
        }
        const bool forked = row->row.context == fork;
        ASSERT_TRUE(sequence.IsMeanOfFirst(*row, count, forked ? fork_at : ~0u, &other))
            << "tokens [" << row->row.range.lo << ", " << row->row.range.hi << ")";
      }
      answers.fetch_add(rows.size());
    }
    if (fork.value != 0) EXPECT_OK(engine_->Close(session_, fork));
  };
  std::thread reader([&] { attend(Seed() + 1); });
  attend(Seed() + 2);
  reader.join();
  writer.join();
  EXPECT_GT(engine_->Stats().runs_made, 0u);
  EXPECT_EQ(engine_->Stats().attend_failures, 0u);
}

}  // namespace
}  // namespace quarry
