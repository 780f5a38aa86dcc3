// The index of a run answers also where the run is reused at another position.
#include <numeric>
#include <vector>

#include "tests/daemon/shift_fixture.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {
    .layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = DType::kBf16};
constexpr uint32_t kRunTokens = 2048, kFirstRun = 128;
// The document behind its own text holds the second run of the grid.
constexpr uint32_t kText = 2048, kDocTokens = 2560, kRestTokens = 300, kOtherText = 256;
constexpr int32_t kShift = -1792;
constexpr ShiftedRange kPlaced = {{kOtherText, kOtherText + kDocTokens}, kShift};
constexpr TokenRange kRunHere = {kFirstRun + kRunTokens + kShift,
                                 kFirstRun + 2 * kRunTokens + kShift};
constexpr uint64_t kIndexes = 2 * 2;  // of both runs of the first prompt, of each KV head
constexpr uint32_t kMaxTokens = 8192;
// By which queries are longer than random ones: heads that seek few tokens, as an index is for.
constexpr float kSharp = 4;
// What answers are in error whose queries are not turned, or wrongly; single heads may be off by
// several times what is tolerated.
constexpr double kTurnedWrongly = 1;
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};

class EngineShiftIndexTest : public ShiftTest {
 protected:
  void SetUp() override { Start(ClusterOptions(kRunTokens, kFirstRun)); }
  static OpenRequest Original(const ModelSpec& spec) {
    return OpenFor(spec, Prompt(100000, kText, kDocTokens, kRestTokens), kMaxTokens);
  }
  static OpenRequest Again(const ModelSpec& spec, uint32_t rest = kRestTokens) {
    OpenRequest request = OpenFor(spec, Prompt(200000, kOtherText, kDocTokens, rest), kMaxTokens);
    request.reuse_shifted = true;
    return request;
  }
  void Sample(ContextId context, uint32_t position, const KvData& data) {
    constexpr uint32_t kSamples = 64;
    std::mt19937_64 random(SteadySeed());
    std::normal_distribution<float> normal;
    std::vector<float> q(size_t{kSamples} * kShape.heads * kShape.head_dim);
    for (float& x : q) x = kSharp * normal(random);
    const std::vector<uint32_t> positions(kSamples, position);
    AppendRequest request;
    request.context = context;
    request.kv_heads = kShape.kv_heads;
    request.range = {position, position + 1};
    request.k = data.k(0, position);
    request.v = data.v(0, position);
    request.query_samples = q.data();
    request.query_positions = positions;
    EXPECT_OK(engine_->Append(session_, request));
  }
  // Leaves the document behind, with its index.
  void CacheIndexed(const ModelSpec& spec, const KvData& data, uint64_t built_before) {
    const auto opened = engine_->Open(session_, Original(spec));
    ASSERT_OK(opened.status());
    Sample(opened->context, 0, data);
    EXPECT_OK(AppendAll(*engine_, session_, opened->context, data,
                        {1, kText + kDocTokens + kRestTokens}));
    WaitForBuilt(built_before + kIndexes);
    EXPECT_OK(engine_->Close(session_, opened->context));
  }
  static std::unique_ptr<OwnedRow> Row(ContextId context, TokenRange range, const Budget& budget) {
    auto row = std::make_unique<OwnedRow>(kShape, context, 0, range, SteadySeed() + 5);
    for (float& x : row->q) x *= kSharp;
    row->row.budget = budget;
    return row;
  }
  std::unique_ptr<OwnedRow> Ask(ContextId context, TokenRange range, const Budget& budget) {
    std::unique_ptr<OwnedRow> rows[1] = {Row(context, range, budget)};
    AttendRows(*engine_, session_, rows);
    EXPECT_OK(rows[0]->answer.status);
    return std::move(rows[0]);
  }
  static double ErrorOf(const KvData& wanted, const OwnedRow& row) {
    return OutputError(wanted, row, std::numeric_limits<double>::infinity());
  }

  const ModelSpec model_ = SmallModel(kShape);
  const KvData original_{kShape, kText + kDocTokens + kRestTokens, SteadySeed() + 2};
};

TEST_F(EngineShiftIndexTest, AnswersAreWithinTheirErrorAndReadLessThanAScan) {
  constexpr uint32_t kTokens = kOtherText + kDocTokens + kRestTokens;
  const KvData other(kShape, kTokens, SteadySeed() + 3);
  constexpr float kTight = 0.02f;
  std::vector<double> usual, tight;  // errors of the worst heads
  uint64_t built = 0;
  for (const RopeCase& c : Ropes(model_.rope)) {
    SCOPED_TRACE(c.name);
    ModelSpec spec = model_;
    spec.rope = c.rope;
    spec.rope.regime_max_tokens = 0;
    CacheIndexed(spec, original_, built);
    built += kIndexes;
    const OpenResult opened = OpenAround(session_, Again(spec), other);
    ASSERT_EQ(opened.shifted, std::vector<ShiftedRange>{kPlaced});
    KvData wanted = Widened(other, kTokens);
    Move(original_, spec.rope, kPlaced, &wanted);
    for (const TokenRange range : {TokenRange{0, kTokens}, TokenRange{500, 2000}}) {
      const auto scanned = Ask(opened.context, range, {});
      EXPECT_LT(ErrorOf(wanted, *scanned), 5e-3);
      for (const float error : {kWithinError.error, kTight}) {
        const auto row = Ask(opened.context, range, {.kind = Budget::Kind::kError, .error = error});
        EXPECT_GT(row->answer.error_estimate, 0);
        const double off = ErrorOf(wanted, *row);
        EXPECT_LT(off, kTurnedWrongly / 2);
        (error == kTight ? tight : usual).push_back(off);
        EXPECT_EQ(row->answer.shifted_tokens, Intersect(range, kPlaced.tokens).size());
        EXPECT_LT(row->answer.bytes_touched, scanned->answer.bytes_touched);
      }
    }
    EXPECT_OK(engine_->Close(session_, opened.context));
  }
  const auto mean = [](const std::vector<double>& x) {
    return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
  };
  EXPECT_LT(mean(usual), 2 * kWithinError.error);
  EXPECT_LT(mean(tight), 2 * kTight);
  EXPECT_EQ(engine_->Stats().index.built, built);  // nothing is learned of queries from elsewhere
}

TEST_F(EngineShiftIndexTest, SingleTokensAreFoundWhereverTheRunIs) {
  constexpr uint32_t kTokens = kOtherText + kDocTokens + kRestTokens;
  const KvData other(kShape, kTokens, SteadySeed() + 3);
  KvData wanted = Widened(other, kTokens);
  Move(original_, model_.rope, kPlaced, &wanted);
  for (const IndexKind kind : {IndexKind::kCodes, IndexKind::kGraph}) {
    SCOPED_TRACE(static_cast<int>(kind));
    EngineOptions options = ClusterOptions(kRunTokens, kFirstRun);
    options.index.choice.kind = kind;
    Start(options);
    CacheIndexed(model_, original_, 0);
    const OpenResult opened = OpenAround(session_, Again(model_), other);
    ASSERT_EQ(opened.shifted, std::vector<ShiftedRange>{kPlaced});
    const auto scanned = Ask(opened.context, {0, kTokens}, {});
    const auto row =
        Ask(opened.context, {0, kTokens}, {.kind = Budget::Kind::kFixedK, .k = kTokens / 4});
    EXPECT_LT(ErrorOf(wanted, *row), kTurnedWrongly / 2);
    EXPECT_LT(row->answer.bytes_touched, scanned->answer.bytes_touched);
    EXPECT_OK(engine_->Close(session_, opened.context));
  }
}

TEST_F(EngineShiftIndexTest, RowsWhereTheRunIsAndElsewhereAreAnsweredInOneBatch) {
  constexpr uint32_t kTokens = kOtherText + kDocTokens + kRestTokens;
  const KvData other(kShape, kTokens, SteadySeed() + 3);
  CacheIndexed(model_, original_, 0);
  const OpenResult there = OpenAround(session_, Original(model_), original_);
  ASSERT_GT(there.reused_tokens, kText + kDocTokens - 1);
  ASSERT_OK(engine_->Seal(session_, there.context).status());
  const OpenResult here = OpenAround(session_, Again(model_), other);
  const TokenRange run_there{kFirstRun + kRunTokens, kFirstRun + 2 * kRunTokens};
  std::vector<std::unique_ptr<OwnedRow>> rows;
  rows.push_back(Row(there.context, run_there, kWithinError));
  rows.push_back(Row(here.context, kRunHere, kWithinError));
  AttendRows(*engine_, session_, rows);
  for (const auto& row : rows) {
    ASSERT_OK(row->answer.status);
    EXPECT_GT(row->answer.error_estimate, 0);
    EXPECT_EQ(row->o, Ask(row->row.context, row->row.range, kWithinError)->o);
  }
  EXPECT_NE(rows[0]->o, rows[1]->o);
}

// Its queries could not be learned from, so that it does not fit them is no reason to renew them.
TEST_F(EngineShiftIndexTest, AuditsOfARunFromElsewhereFindNoDrift) {
  constexpr uint32_t kTokens = kOtherText + kDocTokens + kRestTokens, kAsked = 40;
  EngineOptions options = ClusterOptions(kRunTokens, kFirstRun);
  options.audit.fraction = 1;
  options.audit.queue = 65536;
  options.audit.drift_factor = 0.01;  // every error is too large for it
  Start(options);
  CacheIndexed(model_, original_, 0);
  const KvData other(kShape, kTokens, SteadySeed() + 3);
  const OpenResult opened = OpenAround(session_, Again(model_), other);
  for (uint32_t i = 0; i < kAsked; ++i) {
    EXPECT_GT(Ask(opened.context, kRunHere, kWithinError)->answer.error_estimate, 0);
  }
  WaitFor([](const EngineStats& s) { return s.audit.done == kAsked * kShape.kv_heads; });
  EXPECT_EQ(engine_->Stats().audit.drifts, 0u);
}

TEST_F(EngineShiftIndexTest, AForkKeepsTheRunUpToTheBlockThatItCopies) {
  constexpr uint32_t kTokens = kOtherText + kDocTokens + kRestTokens, kCut = 1500;
  const KvData other(kShape, kTokens, SteadySeed() + 3);
  CacheIndexed(model_, original_, 0);
  const OpenResult opened = OpenAround(session_, Again(model_), other);
  const auto fork = engine_->Fork(session_, {opened.context, kCut, kMaxTokens, {}});
  ASSERT_OK(fork.status());
  EXPECT_OK(engine_->Close(session_, opened.context));
  KvData wanted = Widened(other, kTokens);
  Move(original_, model_.rope, kPlaced, &wanted);
  const auto row = Ask(*fork, {0, kCut}, kWithinError);
  EXPECT_GT(row->answer.error_estimate, 0);
  EXPECT_LT(ErrorOf(wanted, *row), kTurnedWrongly / 2);
  EXPECT_LT(row->answer.bytes_touched, Ask(*fork, {0, kCut}, {})->answer.bytes_touched);
}

// A run of elsewhere and one of the context's own were learned apart: two families.
TEST_F(EngineShiftIndexTest, BudgetsSpanRunsOfBothPlaces) {
  constexpr uint32_t kLongRest = 3600, kTokens = kOtherText + kDocTokens + kLongRest;
  constexpr uint32_t kBest = 300, kMost = 20;
  const KvData other(kShape, kTokens, SteadySeed() + 3);
  CacheIndexed(model_, original_, 0);
  const OpenResult opened = OpenAround(session_, Again(model_, kLongRest), other);
  WaitForBuilt(kIndexes + 2);  // and of the run behind the stretch
  KvData wanted = Widened(other, kTokens);
  Move(original_, model_.rope, kPlaced, &wanted);

  const auto best = Ask(opened.context, {0, kTokens}, {Budget::Kind::kFixedK, kBest});
  EXPECT_EQ(best->answer.tokens_attended, uint64_t{kBest} * kShape.heads);
  const TopKAnswer top = engine_->TopK(session_, best->row, kBest, false);
  ASSERT_OK(top.status);
  for (uint32_t h = 0; h < kShape.heads; ++h) {
    std::vector<bool> is_best(kTokens);
    for (const TopKEntry& entry : top.heads[h]) is_best[entry.token] = true;
    const ReferenceHead reference =
        ReferenceAttention(wanted, 0, {0, kTokens}, best->q.data() + h * kShape.head_dim, h,
                           [&](uint32_t t) { return is_best[t]; });
    EXPECT_NEAR(best->lse[h], reference.lse, 1e-3) << "head " << h;
  }

  const auto capped =
      Ask(opened.context, {0, kTokens}, {.kind = Budget::Kind::kError, .k = kMost, .error = 1e-3f});
  EXPECT_GT(capped->answer.error_estimate, 0);
  // The heads of a group share what either of them wants.
  const uint64_t scanned = kTokens - 2 * kRunTokens;
  EXPECT_LE(capped->answer.tokens_attended,
            kShape.heads * (scanned + uint64_t{kShape.group()} * kMost));
}

}  // namespace
}  // namespace quarry
