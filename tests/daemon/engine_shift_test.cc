// Attention over blocks that are reused at another position.
#include <vector>

#include "tests/daemon/shift_fixture.h"

namespace quarry {
namespace {

using EngineShiftTest = ShiftTest;

// The whole feature in one: the answer is the exact one over keys computed at the new position.
TEST_F(EngineShiftTest, AnswersAreThoseOverKeysTurnedToTheNewPosition) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const RopeCase& c : Ropes(spec_.rope)) {
      SCOPED_TRACE(c.name);
      ModelSpec spec = SmallModel(SmallShape(dtype));
      spec.weights.bytes[1] = static_cast<uint8_t>(dtype);
      spec.rope = c.rope;
      const KvData first(spec.shape, first_.tokens(), Seed()),
          second(spec.shape, kTotal, Seed() + 1);
      Cache(session_, First(spec), first);
      const OpenResult opened = OpenAround(session_, Second(spec), second);
      ASSERT_EQ(opened.reused_tokens, 0u);
      ASSERT_EQ(opened.shifted, std::vector<ShiftedRange>{kMoved});
      KvData wanted = Widened(second, kTotal);
      Move(first, spec.rope, kMoved, &wanted);
      for (const TokenRange range : {TokenRange{0, kTotal}, TokenRange{300, 1200},
                                     TokenRange{128, 700}, TokenRange{1000, kTotal}}) {
        for (const DType q_dtype : {DType::kFp32, DType::kBf16}) {
          std::unique_ptr<OwnedRow> rows[1] = {
              std::make_unique<OwnedRow>(spec.shape, opened.context, 1, range, Seed() + range.lo)};
          std::vector<char> narrow(rows[0]->q.size() * DTypeBytes(q_dtype));
          for (size_t i = 0; i < rows[0]->q.size(); ++i) {
            StoreFromFloat(narrow.data(), i, q_dtype, rows[0]->q[i]);
            rows[0]->q[i] = LoadAsFloat(narrow.data(), i, q_dtype);
          }
          rows[0]->row.q_dtype = q_dtype;
          AttendRow row = rows[0]->row;
          row.q = narrow.data();
          absl::Notification done;
          engine_->Attend(session_, std::span(&row, 1), std::span(&rows[0]->answer, 1),
                          [&] { done.Notify(); });
          done.WaitForNotification();
          ASSERT_TRUE(rows[0]->answer.status.ok()) << rows[0]->answer.status;
          EXPECT_EQ(rows[0]->answer.covered, range);
          EXPECT_EQ(rows[0]->answer.shifted_tokens, Intersect(range, kMoved.tokens).size());
          EXPECT_LT(WorstError(wanted, *rows[0]), 2e-3) << range.lo << " " << range.hi;
        }
      }
      EXPECT_OK(engine_->Close(session_, opened.context));
    }
  }
}

TEST_F(EngineShiftTest, BudgetsRankTokensByTheirTurnedKeys) {
  Cache(session_, First(spec_), first_);
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  KvData wanted = Widened(second_, kTotal);
  Move(first_, spec_.rope, kMoved, &wanted);
  Budget all_mass{Budget::Kind::kTopP, 0, 0.999999f};
  const auto exact =
      AttendOne(*engine_, session_, spec_.shape, opened.context, 0, {0, kTotal}, Seed(), all_mass);
  ASSERT_TRUE(exact->answer.status.ok()) << exact->answer.status;
  EXPECT_LT(WorstError(wanted, *exact), 2e-3);
  constexpr uint32_t kBest = 40;
  const auto row = AttendOne(*engine_, session_, spec_.shape, opened.context, 0, {0, kTotal},
                             Seed(), {Budget::Kind::kFixedK, kBest});
  ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
  EXPECT_EQ(row->answer.shifted_tokens, kDocument);
  const TopKAnswer top = engine_->TopK(session_, row->row, kBest, true);
  ASSERT_TRUE(top.status.ok()) << top.status;
  for (uint32_t h = 0; h < spec_.shape.heads; ++h) {
    std::vector<bool> best(kTotal);
    for (const TopKEntry& entry : top.heads[h]) best[entry.token] = true;
    const ReferenceHead reference =
        ReferenceAttention(wanted, 0, {0, kTotal}, row->q.data() + h * spec_.shape.head_dim, h,
                           [&](uint32_t t) { return best[t]; });
    EXPECT_NEAR(row->lse[h], reference.lse, 1e-3) << "head " << h;
  }
}

TEST_F(EngineShiftTest, TopKAndReadGiveTurnedKeys) {
  Cache(session_, First(spec_), first_);
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  KvData wanted = Widened(second_, kTotal);
  Move(first_, spec_.rope, kMoved, &wanted);
  const KvShape& s = spec_.shape;
  const auto near = [&](float got, float want) {
    EXPECT_NEAR(got, want, 0.005 + 0.004 * std::abs(want));  // bf16
  };
  const TokenRange range{200, 600};
  std::vector<std::byte> k(range.size() * second_.token_bytes()), v(k.size());
  ASSERT_OK(engine_->Read(session_, opened.context, 1, range, k, v));
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    for (uint32_t i = 0; i < s.kv_heads * s.head_dim; ++i) {
      const size_t at = (t - range.lo) * size_t{s.kv_heads} * s.head_dim + i;
      near(LoadAsFloat(k.data(), at, s.dtype), LoadAsFloat(wanted.k(1, t), i, DType::kFp32));
      EXPECT_EQ(LoadAsFloat(v.data(), at, s.dtype), LoadAsFloat(wanted.v(1, t), i, DType::kFp32));
    }
  }
  const OwnedRow row(s, opened.context, 1, {0, kTotal}, Seed());
  const TopKAnswer top = engine_->TopK(session_, row.row, 25, true);
  ASSERT_TRUE(top.status.ok()) << top.status;
  EXPECT_EQ(top.shifted_tokens, kDocument);
  for (uint32_t h = 0; h < s.heads; ++h) {
    for (size_t e = 0; e < top.heads[h].size(); ++e) {
      const TopKEntry& entry = top.heads[h][e];
      double score = 0;
      for (uint32_t d = 0; d < s.head_dim; ++d) {
        const float key = wanted.K(1, entry.token, h / s.group(), d);
        score += double{row.q[h * s.head_dim + d]} * key;
        near(LoadAsFloat(top.k[h].data(), e * s.head_dim + d, s.dtype), key);
      }
      EXPECT_NEAR(entry.score, score / std::sqrt(s.head_dim), 1e-3);
    }
  }
}

// Rows of one batch share the stored blocks, each at its own distance.
TEST_F(EngineShiftTest, ContextsWithOtherShiftsAreAnsweredInOneBatch) {
  const OpenRequest request = First(spec_);
  Cache(session_, request, first_);
  const OpenResult plain = OpenAround(session_, request, first_);
  ASSERT_GT(plain.reused_tokens, kFirstText + kDocument - 1);
  const OpenResult near = OpenAround(session_, Second(spec_), second_);
  const KvData third(spec_.shape, 768 + kDocument + kRest, Seed() + 2);
  OpenRequest behind = OpenFor(spec_, Prompt(300000, 768, kDocument, kRest), 4096);
  behind.reuse_shifted = true;
  const OpenResult far = OpenAround(session_, behind, third);
  const ShiftedRange moved_far{{768, 768 + kDocument}, 256};
  ASSERT_EQ(far.shifted, std::vector<ShiftedRange>{moved_far});

  std::vector<KvData> wanted = {Widened(first_, kTotal), Widened(second_, kTotal),
                                Widened(third, kTotal)};
  Move(first_, spec_.rope, kMoved, &wanted[1]);
  Move(first_, spec_.rope, {{768, kTotal}, 256}, &wanted[2]);
  const ContextId contexts[] = {plain.context, near.context, far.context};
  std::vector<std::unique_ptr<OwnedRow>> rows;
  for (uint32_t i = 0; i < 12; ++i) {
    rows.push_back(std::make_unique<OwnedRow>(spec_.shape, contexts[i % 3], i % 2,
                                              TokenRange{i * 31, kTotal - i * 5}, Seed() + i));
    if (i >= 6) rows.back()->row.budget = {Budget::Kind::kTopP, 0, 0.999999f};
  }
  AttendRows(*engine_, session_, rows);
  for (uint32_t i = 0; i < rows.size(); ++i) {
    ASSERT_TRUE(rows[i]->answer.status.ok()) << rows[i]->answer.status;
    EXPECT_LT(WorstError(wanted[i % 3], *rows[i]), 2e-3) << "row " << i;
    EXPECT_EQ(rows[i]->answer.shifted_tokens > 0, i % 3 != 0);
  }
  EXPECT_EQ(engine_->Stats().attend_shifted_rows, 8u);
}

TEST_F(EngineShiftTest, AppendsGoOnBehindAStretch) {
  Cache(session_, First(spec_), first_);
  auto opened = engine_->Open(session_, Second(spec_));
  ASSERT_TRUE(opened.ok()) << opened.status();
  const ContextId context = opened->context;
  EXPECT_EQ(engine_->Info(session_, context)->tokens, 0u);
  EXPECT_EQ(engine_->Info(session_, context)->shifted_tokens, kDocument);
  // Tokens before the stretch are to come first: nothing beyond them can be attended yet.
  EXPECT_TRUE(absl::IsInvalidArgument(
      AttendOne(*engine_, session_, spec_.shape, context, 0, {0, 300}, 1)->answer.status));
  EXPECT_TRUE(absl::IsInvalidArgument(
      AppendAll(*engine_, session_, context, second_, {0, kMoved.tokens.lo + 1})));
  EXPECT_OK(AppendAll(*engine_, session_, context, second_, {0, 100}));
  EXPECT_EQ(engine_->Info(session_, context)->tokens, 100u);
  EXPECT_OK(AppendAll(*engine_, session_, context, second_, {100, kMoved.tokens.lo}));
  EXPECT_EQ(engine_->Info(session_, context)->tokens, kMoved.tokens.hi);
  EXPECT_TRUE(absl::IsInvalidArgument(
      AppendAll(*engine_, session_, context, second_, {kMoved.tokens.lo, kMoved.tokens.lo + 1})));
  // A decode step's token is the next one too.
  auto row = std::make_unique<OwnedRow>(spec_.shape, context, 0,
                                        TokenRange{0, kMoved.tokens.hi + 1}, Seed());
  row->row.has_token = true;
  row->row.token_position = kMoved.tokens.hi;
  row->row.k = second_.k(0, kMoved.tokens.hi);
  row->row.v = second_.v(0, kMoved.tokens.hi);
  AttendRows(*engine_, session_, std::span(&row, 1));
  EXPECT_OK(row->answer.status);
  EXPECT_EQ(row->answer.shifted_tokens, kDocument);
}

TEST_F(EngineShiftTest, ForksKeepWhatIsPlacedBeforeThem) {
  Cache(session_, First(spec_), first_);
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  KvData wanted = Widened(second_, kTotal);
  Move(first_, spec_.rope, kMoved, &wanted);
  struct Case {
    uint32_t at, shifted;
  };
  for (const Case& c : {Case{100, 0}, Case{256, 0}, Case{512, 256}, Case{700, 444},
                        Case{1280, 1024}, Case{1500, 1024}}) {
    SCOPED_TRACE(c.at);
    auto fork = engine_->Fork(session_, {opened.context, c.at, 4096, {}});
    ASSERT_TRUE(fork.ok()) << fork.status();
    EXPECT_EQ(engine_->Info(session_, *fork)->shifted_tokens, c.shifted);
    // Goes on with tokens of its own.
    KvData forked = Widened(wanted, kTotal);
    const KvData own(spec_.shape, kTotal, Seed() + c.at);
    EXPECT_OK(AppendAll(*engine_, session_, *fork, own, {c.at, kTotal}));
    forked.Overwrite(c.at, Widened(own, kTotal));
    const auto row =
        AttendOne(*engine_, session_, spec_.shape, *fork, 1, {0, kTotal}, Seed() + c.at);
    ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
    EXPECT_EQ(row->answer.shifted_tokens, c.shifted);
    EXPECT_LT(WorstError(forked, *row), 4e-3);  // the cut block's keys are rounded once more
    EXPECT_OK(engine_->Close(session_, *fork));
  }
}

// Runs lie on a grid of positions: those of the document's own context are not this one's, though
// both end with the same block.
TEST_F(EngineShiftTest, RunsThatMeetAStretchAreScannedWithoutOne) {
  const OpenRequest request = First(spec_);
  Cache(session_, request, first_);
  const OpenResult plain = OpenAround(session_, request, first_);
  ASSERT_TRUE(engine_->Seal(session_, plain.context).ok());
  const uint64_t runs = engine_->Stats().runs_made;
  EXPECT_GT(runs, 0u);
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
  EXPECT_EQ(engine_->Stats().runs_made, runs);
  // Behind the stretch there are runs again.
  const KvData longer(spec_.shape, 4096, Seed() + 3);
  OpenRequest long_request = OpenFor(spec_, Prompt(200000, kSecondText, kDocument, 2600), 4096);
  long_request.reuse_shifted = true;
  const OpenResult with_runs = OpenAround(session_, long_request, longer);
  ASSERT_TRUE(engine_->Seal(session_, with_runs.context).ok());
  EXPECT_EQ(engine_->Stats().runs_made, runs + 1);
}

TEST_F(EngineShiftTest, ReusedBlocksAreNotLeasedWhereTheirKeysAreOfElsewhere) {
  Cache(session_, First(spec_), first_);
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  const auto lease = engine_->LeaseContextBlock(session_, opened.context, 2);
  EXPECT_TRUE(absl::IsFailedPrecondition(lease.status())) << lease.status();
}

}  // namespace
}  // namespace quarry
