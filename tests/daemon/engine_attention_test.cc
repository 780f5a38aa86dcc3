// Attention through the engine against attention in double on the same rounded inputs.
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kWindowFirst = 128, kWindowLast = 512;

double ErrorBound(DType dtype) { return dtype == DType::kFp32 ? 1e-5 : 1e-3; }

class EngineAttentionTest : public EngineTest, public ::testing::WithParamInterface<DType> {
 protected:
  KvShape shape_ = SmallShape(GetParam());

  void ExpectExact(ContextId context, const KvData& data, TokenRange range, uint32_t layer = 1) {
    const auto row = AttendOne(*engine_, session_, shape_, context, layer, range, Seed() + 7);
    ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
    EXPECT_EQ(row->answer.covered, range);
    EXPECT_EQ(row->answer.tokens_attended, uint64_t{range.size()} * shape_.heads);
    EXPECT_LE(WorstError(data, *row), ErrorBound(GetParam()))
        << "tokens [" << range.lo << ", " << range.hi << ")";
  }
};

INSTANTIATE_TEST_SUITE_P(DTypes, EngineAttentionTest,
                         ::testing::Values(DType::kBf16, DType::kFp16, DType::kFp32),
                         [](const auto& info) { return std::string(DTypeName(info.param)); });

TEST_P(EngineAttentionTest, EqualsFullAttentionAtEveryLengthAroundTheWindow) {
  Start();
  for (const uint32_t tokens : {1u, 2u, 127u, 255u, 256u, 257u, 639u, 640u, 641u}) {
    SCOPED_TRACE(tokens);
    const KvData data(shape_, tokens, Seed() + tokens);
    const OpenResult opened = OpenAndFill(
        session_, OpenFor(SmallModel(shape_), Tokens(tokens, tokens * 10000), tokens), data);
    ExpectExact(opened.context, data, {0, tokens}, 0);
    ExpectExact(opened.context, data, {0, tokens}, 1);
    ExpectExact(opened.context, data, {tokens / 2, tokens});
    if (tokens > kWindowFirst + kWindowLast) {
      ExpectExact(opened.context, data, {kWindowFirst, tokens - kWindowLast});
    }
    EXPECT_OK(engine_->Close(session_, opened.context));
  }
}

TEST_P(EngineAttentionTest, EqualsFullAttentionOver40000TokensAlsoForked) {
  shape_ = {.layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 32, .dtype = GetParam()};
  Start();
  constexpr uint32_t kTokens = 40000, kFork = 30001;
  KvData data(shape_, kTokens, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape_), Tokens(kTokens), kTokens), data);
  ExpectExact(opened.context, data, {kWindowFirst, kTokens - kWindowLast}, 0);

  auto fork = engine_->Fork(session_, {opened.context, kFork, kTokens, {}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  KvData forked = data;
  forked.Overwrite(kFork, KvData(shape_, kTokens, Seed() + 1));
  ASSERT_OK(AppendAll(*engine_, session_, *fork, forked, {kFork, kTokens}));
  ExpectExact(*fork, forked, {0, kTokens}, 0);
  ExpectExact(opened.context, data, {0, kTokens}, 0);
}

TEST_P(EngineAttentionTest, EqualsFullAttentionAfterEvictionAndRecomputation) {
  EngineOptions options = SmallOptions();
  options.arena.capacity_bytes = 8 << 20;
  Start(options);
  constexpr uint32_t kTokens = 1500;
  const KvData data(shape_, kTokens, Seed());
  const OpenRequest request = OpenFor(SmallModel(shape_), Tokens(kTokens), kTokens);
  Cache(session_, request, data);
  EXPECT_EQ(Reused(session_, request), kTokens / kBlockTokens * kBlockTokens);

  // Other contexts push it out.
  for (uint32_t i = 0; engine_->Stats().store.evictions < 2 * kTokens / kBlockTokens; ++i) {
    ASSERT_LT(i, 1000u);
    Cache(session_, OpenFor(SmallModel(shape_), Tokens(kTokens, 50000 + 2000 * i), kTokens), data);
  }
  EXPECT_EQ(Reused(session_, request), 0u);

  const OpenResult again = OpenAndFill(session_, request, data);
  EXPECT_EQ(again.reused_tokens, 0u);
  ExpectExact(again.context, data, {0, kTokens});
  ASSERT_TRUE(engine_->Seal(session_, again.context).ok());
  const OpenResult reused = OpenAndFill(session_, request, data);
  EXPECT_EQ(reused.reused_tokens, kTokens / kBlockTokens * kBlockTokens);
  ExpectExact(reused.context, data, {0, kTokens});
}

TEST_P(EngineAttentionTest, RowsOfABatchShareBlocksAndEachHasItsOwnAnswer) {
  Start();
  constexpr uint32_t kTokens = 3000, kMore = 3100;
  KvData data(shape_, kMore, Seed());
  const OpenRequest request = OpenFor(SmallModel(shape_), Tokens(kTokens), kMore);
  const OpenResult first = OpenAndFill(session_, request, data);
  ASSERT_TRUE(engine_->Seal(session_, first.context).ok());
  const OpenResult second = OpenAndFill(session_, request, data);
  ASSERT_EQ(second.reused_tokens, 2816u);
  auto fork = engine_->Fork(session_, {second.context, 1300, kMore, {}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  KvData forked = data;
  forked.Overwrite(1300, KvData(shape_, kMore, Seed() + 1));
  ASSERT_OK(AppendAll(*engine_, session_, *fork, forked, {1300, kMore}));

  std::vector<std::unique_ptr<OwnedRow>> rows;
  std::vector<const KvData*> expected;
  const auto add = [&](ContextId context, uint32_t layer, TokenRange range, const KvData& kv) {
    rows.push_back(std::make_unique<OwnedRow>(shape_, context, layer, range, Seed() + rows.size()));
    expected.push_back(&kv);
  };
  add(first.context, 0, {0, kTokens}, data);
  add(second.context, 0, {128, kTokens - 512}, data);
  add(*fork, 0, {0, kMore}, forked);
  add(*fork, 1, {100, 1301}, forked);
  add(second.context, 0, {300, 301}, data);
  add(first.context, 1, {2999, 3000}, data);
  add(first.context, 0, {5, 5}, data);
  AttendRows(*engine_, session_, rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(rows[i]->answer.status.ok()) << rows[i]->answer.status;
    if (rows[i]->row.range.empty()) {
      EXPECT_EQ(rows[i]->lse[0], kEmptyLse);
      EXPECT_EQ(rows[i]->o, std::vector<float>(rows[i]->o.size()));
      continue;
    }
    EXPECT_LE(WorstError(*expected[i], *rows[i]), ErrorBound(GetParam()));
  }
}

TEST_P(EngineAttentionTest, ARowOverNoTokensNeedsNoQueriesAndNoRoomAndStoresItsToken) {
  Start();
  constexpr uint32_t kTokens = 20;
  const KvData data(shape_, kTokens + 1, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape_), Tokens(kTokens), kTokens + 1), data);
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    AttendRow row;
    row.context = opened.context;
    row.layer = layer;
    row.range = {9, 9};
    row.heads = shape_.heads;
    row.has_token = true;
    row.token_position = kTokens;
    row.k = data.k(layer, kTokens);
    row.v = data.v(layer, kTokens);
    AttendAnswer answer;
    absl::Notification done;
    engine_->Attend(session_, {&row, 1}, {&answer, 1}, [&] { done.Notify(); });
    done.WaitForNotification();
    ASSERT_TRUE(answer.status.ok()) << answer.status;
    EXPECT_EQ(answer.tokens_attended, 0u);
  }
  ExpectExact(opened.context, data, {0, kTokens + 1});
}

TEST_P(EngineAttentionTest, ARangeOfHeadsIsAnsweredAlone) {
  Start();
  const KvData data(shape_, 600, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape_), Tokens(600), 600), data);
  std::unique_ptr<OwnedRow> rows[1] = {
      std::make_unique<OwnedRow>(shape_, opened.context, 0, TokenRange{0, 600}, Seed())};
  OwnedRow& row = *rows[0];
  row.row.first_head = 2;
  row.row.heads = 2;
  row.answer.o = std::span(row.o).first(2 * shape_.head_dim);
  row.answer.lse = std::span(row.lse).first(2);
  AttendRows(*engine_, session_, rows);
  ASSERT_TRUE(row.answer.status.ok()) << row.answer.status;
  EXPECT_LE(WorstError(data, row), ErrorBound(GetParam()));
}

TEST_P(EngineAttentionTest, QueriesOfEveryDTypeAreWidenedExactly) {
  Start();
  const KvData data(shape_, 300, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape_), Tokens(300), 300), data);
  for (const DType q_dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    SCOPED_TRACE(DTypeName(q_dtype));
    OwnedRow row(shape_, opened.context, 0, {0, 300}, Seed());
    std::string narrow(row.q.size() * DTypeBytes(q_dtype), '\0');
    row.q[3] = 1e-7f;  // a subnormal half
    for (size_t i = 0; i < row.q.size(); ++i) {
      StoreFromFloat(narrow.data(), i, q_dtype, row.q[i]);
      row.q[i] = LoadAsFloat(narrow.data(), i, q_dtype);
    }
    row.row.q = narrow.data();
    row.row.q_dtype = q_dtype;
    absl::Notification done;
    engine_->Attend(session_, {&row.row, 1}, {&row.answer, 1}, [&] { done.Notify(); });
    done.WaitForNotification();
    ASSERT_TRUE(row.answer.status.ok()) << row.answer.status;
    EXPECT_LE(WorstError(data, row), ErrorBound(GetParam()));
  }
}

TEST_P(EngineAttentionTest, DecodeStoresEachTokenBeforeItAnswers) {
  Start();
  constexpr uint32_t kPrompt = 500, kTokens = 800;
  const KvData data(shape_, kTokens, Seed());
  OpenRequest request = OpenFor(SmallModel(shape_), Tokens(kPrompt), kTokens);
  const OpenResult opened = OpenAndFill(session_, request, data);
  for (uint32_t t = kPrompt; t < kTokens; ++t) {
    for (uint32_t l = 0; l < shape_.layers; ++l) {
      std::unique_ptr<OwnedRow> rows[1] = {
          std::make_unique<OwnedRow>(shape_, opened.context, l, TokenRange{0, t + 1}, Seed() + t)};
      rows[0]->row.has_token = true;
      rows[0]->row.token_position = t;
      rows[0]->row.k = data.k(l, t);
      rows[0]->row.v = data.v(l, t);
      AttendRows(*engine_, session_, rows);
      ASSERT_TRUE(rows[0]->answer.status.ok()) << rows[0]->answer.status;
      if (t % 100 == 99) {
        EXPECT_LE(WorstError(data, *rows[0]), ErrorBound(GetParam()));
      }
    }
  }
  // Decoded tokens are published once their ids are known.
  const std::vector<uint32_t> all = Tokens(kTokens);
  ASSERT_OK(engine_->DeclareTokens(session_, opened.context, std::span(all).subspan(kPrompt)));
  auto info = engine_->Seal(session_, opened.context);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->shared_tokens, 768u);
  request.tokens = all;
  EXPECT_EQ(Reused(session_, request), 768u);
}

TEST_P(EngineAttentionTest, TopKRanksByScoreAndGathersTheirBytes) {
  Start();
  constexpr uint32_t kTokens = 2000, kTop = 50;
  const KvData data(shape_, kTokens, Seed());
  const OpenResult opened =
      OpenAndFill(session_, OpenFor(SmallModel(shape_), Tokens(kTokens), kTokens), data);
  const TokenRange range{128, 1800};
  OwnedRow row(shape_, opened.context, 1, range, Seed());
  const TopKAnswer answer = engine_->TopK(session_, row.row, kTop, /*gather=*/true);
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  ASSERT_EQ(answer.heads.size(), shape_.heads);
  for (uint32_t h = 0; h < shape_.heads; ++h) {
    std::vector<std::pair<double, uint32_t>> ranked;
    for (uint32_t t = range.lo; t < range.hi; ++t) {
      double z = 0;
      for (uint32_t d = 0; d < shape_.head_dim; ++d) {
        z += double{row.q[h * shape_.head_dim + d]} * data.K(1, t, h / shape_.group(), d);
      }
      ranked.emplace_back(-z / std::sqrt(static_cast<double>(shape_.head_dim)), t);
    }
    std::sort(ranked.begin(), ranked.end());
    ASSERT_EQ(answer.heads[h].size(), kTop);
    for (uint32_t i = 0; i < kTop; ++i) {
      const TopKEntry& entry = answer.heads[h][i];
      EXPECT_NEAR(entry.score, -ranked[i].first, 1e-4);
      if (i > 0) {
        EXPECT_LE(entry.score, answer.heads[h][i - 1].score);
      }
      const size_t bytes = shape_.vector_bytes();
      const size_t offset = h / shape_.group() * bytes;
      EXPECT_EQ(answer.k[h].substr(i * bytes, bytes),
                std::string(data.k(1, entry.token) + offset, bytes));
      EXPECT_EQ(answer.v[h].substr(i * bytes, bytes),
                std::string(data.v(1, entry.token) + offset, bytes));
    }
  }
  const TopKAnswer all = engine_->TopK(session_, row.row, 10 * kTokens, /*gather=*/false);
  ASSERT_TRUE(all.status.ok()) << all.status;
  EXPECT_EQ(all.heads[0].size(), range.size());
}

}  // namespace
}  // namespace quarry
