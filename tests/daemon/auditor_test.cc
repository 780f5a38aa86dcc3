// Audits tell right answers from wrong ones, hold nobody's memory, and stop when they are told to.
#include "daemon/auditor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/synchronization/notification.h"
#include "cpu_index/cluster_learn.h"
#include "cpu_index/cluster_search.h"
#include "daemon/audit_measure.h"
#include "daemon/kv_segments.h"
#include "daemon/run_registry.h"
#include "tests/daemon/engine_fixture.h"
#include "tests/support/eventually.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {
    .layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 16, .dtype = DType::kFp32};
constexpr uint32_t kTokens = 2560, kStep = 512;
constexpr TokenRange kRun{128, 2176}, kRange{64, 2400};
constexpr uint32_t kLayer = 1, kKvHead = 1;

// Lists some tokens of its run with their exact scores, for every query the same.
class ListIndex final : public TokenIndex {
 public:
  explicit ListIndex(std::vector<uint32_t> tokens) : tokens_(std::move(tokens)) {}
  std::string_view kind() const override { return "list"; }
  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override {
    ExactScan().AttendAll(run, queries, acc);
  }
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override {
    ++searches;
    CoarseScores all;
    ExactScan().Score(run, queries, &all);
    out->Clear();
    out->tokens = run.tokens();
    out->nodes = run.tokens().size();
    out->first = {0};
    for (uint32_t q = 0; q < queries.queries; ++q) {
      for (uint32_t token : tokens_) {
        out->node.push_back(token - run.tokens().lo);
        out->score.push_back(all.Row(q)[token - run.tokens().lo]);
      }
      out->first.push_back(static_cast<uint32_t>(out->node.size()));
    }
  }
  void Refine(const KvView&, const QueryBlock&, const CoarseScores&, const RunAllotment&,
              std::span<Partial>) const override {}

  mutable int searches = 0;

 private:
  const std::vector<uint32_t> tokens_;
};

// Stands for one that estimates answers.
class EstimatingIndex final : public KeyIndex {
 public:
  std::string_view kind() const override { return "estimates"; }
};

class FakeSubject final : public AuditSubject {
 public:
  explicit FakeSubject(std::shared_ptr<const BlockTable> table) : table_(std::move(table)) {}
  const std::string& tenant() const override { return tenant_; }
  const std::string& model() const override { return model_; }
  const KvShape& shape() const override { return kShape; }
  std::shared_ptr<const BlockTable> Memory() const override {
    if (asked != nullptr && !asked->HasBeenNotified()) {
      asked->Notify();
      answer->WaitForNotification();
    }
    absl::MutexLock lock(&mutex_);
    return table_;
  }
  bool NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit) override {
    EXPECT_EQ(layer, kLayer);
    EXPECT_EQ(kv_head, kKvHead);
    fits.push_back(fit);
    return drift_.Note(0, fit);
  }
  void Close() {
    absl::MutexLock lock(&mutex_);
    table_ = nullptr;
  }

  std::string tenant_ = "alice", model_ = "small";
  std::vector<IndexFit> fits;  // read after Flush
  // Where set: the first who asks for memory says so, and waits.
  absl::Notification *asked = nullptr, *answer = nullptr;

 private:
  DriftWatch drift_{1};
  mutable absl::Mutex mutex_;
  std::shared_ptr<const BlockTable> table_;
};

class AuditorTest : public ::testing::Test {
 protected:
  AuditorTest() {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 16 << 20;
    options.arena.extent_bytes = 1 << 20;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    store_ = *BlockStore::Create(options);
    const uint64_t bytes = kShape.bytes_per_token() * kBlockTokens;
    constexpr uint32_t kBlocks = kTokens / kBlockTokens;
    EXPECT_OK(store_->Reserve("t", bytes, kBlocks));
    std::mt19937_64 random(SteadySeed());
    std::normal_distribution<float> normal;
    auto table = std::make_shared<BlockTable>();
    for (uint32_t b = 0; b < kBlocks; ++b) {
      table->blocks.push_back(
          std::make_shared<HeldBlock>(*store_, *store_->Begin("t", bytes), BlockOrigin{}));
      for (uint64_t at = 0; at < bytes; at += 4) {
        const float x = normal(random);
        std::memcpy(table->blocks.back()->writable() + at, &x, 4);
      }
    }
    const std::vector blocks(table->blocks.begin(),
                             table->blocks.begin() + (kRun.hi + kBlockTokens - 1) / kBlockTokens);
    indexes_ = std::make_shared<RunIndexes>(kShape);
    table->runs = {{quarry::Run::Make(kRun, blocks, indexes_), kRun}};
    q_.resize(size_t{kShape.group()} * kShape.head_dim);
    for (float& x : q_) x = normal(random);
    blocks_ = table->blocks;
    table_ = table;
    subject_ = std::make_shared<FakeSubject>(std::move(table));
  }

  const float* Vector(KvPart part, uint32_t token) const {
    const std::byte* block = blocks_[token / kBlockTokens]->data();
    return reinterpret_cast<const float*>(block + kShape.strip_offset(kLayer, part, kKvHead) +
                                          token % kBlockTokens * kShape.vector_bytes());
  }
  double Score(uint32_t g, uint32_t token) const {
    const float* const stored = Vector(KvPart::kKey, token);
    std::vector<float> key(stored, stored + kShape.head_dim);
    const Rotation* const turn = table_->TurnAt(token);
    if (turn != nullptr) turn->TurnKeys(key.data(), 1, kShape.head_dim);
    double score = 0;
    for (uint32_t d = 0; d < kShape.head_dim; ++d) {
      score += double{q_[g * kShape.head_dim + d]} * key[d];
    }
    return score / 4;
  }
  // From here on these tokens are of another position, and no run has any.
  void Place(TokenRange tokens, int32_t distance) {
    RopeSpec rope;
    rope.inv_freq = {1.0f, 0.1f, 0.01f, 0.001f};
    rope.rotary_dim = 8;
    auto table = std::make_shared<BlockTable>(*table_);
    table->runs.clear();
    table->placed = {{tokens, std::make_shared<const Rotation>(rope, distance)}};
    table_ = table;
    subject_ = std::make_shared<FakeSubject>(std::move(table));
  }
  static std::vector<uint32_t> All(TokenRange range) {
    std::vector<uint32_t> tokens(range.size());
    std::iota(tokens.begin(), tokens.end(), range.lo);
    return tokens;
  }
  // Tokens of the run by falling score of query head g.
  std::vector<uint32_t> Best(uint32_t g, TokenRange range) const {
    std::vector<uint32_t> tokens = All(range);
    std::sort(tokens.begin(), tokens.end(),
              [&](uint32_t a, uint32_t b) { return Score(g, a) > Score(g, b); });
    return tokens;
  }
  // Attention over these tokens, for each query head.
  ReferenceHead Attention(uint32_t g, const std::vector<uint32_t>& tokens) const {
    ReferenceHead answer;
    answer.o.resize(kShape.head_dim);
    double sum = 0;
    for (uint32_t token : tokens) {
      const double weight = std::exp(Score(g, token));
      sum += weight;
      for (uint32_t d = 0; d < kShape.head_dim; ++d) {
        answer.o[d] += weight * Vector(KvPart::kValue, token)[d];
      }
    }
    for (double& x : answer.o) x /= sum;
    answer.lse = std::log(sum);
    return answer;
  }
  AuditedQuery Query(const Budget& budget,
                     const std::vector<std::vector<uint32_t>>& tokens_of_heads,
                     TokenRange range = kRange) const {
    AuditedQuery query;
    query.subject = subject_;
    query.layer = kLayer;
    query.kv_head = kKvHead;
    query.range = range;
    query.budget = budget;
    query.q = q_;
    for (uint32_t g = 0; g < kShape.group(); ++g) {
      const ReferenceHead answer = Attention(g, tokens_of_heads[g]);
      for (double x : answer.o) query.o.push_back(static_cast<float>(x));
      query.lse.push_back(static_cast<float>(answer.lse));
    }
    return query;
  }
  // The exact answer, its o too long by `factor`.
  AuditedQuery Stretched(double factor, float predicted, TokenRange range = kRange) const {
    AuditedQuery query =
        Query({.kind = Budget::Kind::kError, .error = 0.05f}, {All(range), All(range)}, range);
    for (float& x : query.o) x *= static_cast<float>(factor);
    query.predicted = predicted;
    return query;
  }
  double MassOf(uint32_t g, const std::vector<uint32_t>& tokens) const {
    return std::exp(Attention(g, tokens).lse - Attention(g, All(kRange)).lse);
  }
  static AuditFigures Audited(Auditor& auditor, const AuditedQuery& query) {
    auditor.Offer(query);
    auditor.Flush();
    const std::vector<HeadAudit> heads = auditor.Of("alice");
    EXPECT_EQ(heads.size(), 1u);
    return heads.empty() ? AuditFigures{} : heads.front().figures;
  }

  std::unique_ptr<BlockStore> store_;
  std::vector<std::shared_ptr<HeldBlock>> blocks_;
  std::shared_ptr<RunIndexes> indexes_;
  std::shared_ptr<const BlockTable> table_;  // the subject's
  std::shared_ptr<FakeSubject> subject_;
  std::vector<float> q_;
};

TEST_F(AuditorTest, AnAnswerThatIsExactHasNoError) {
  Auditor auditor({.fraction = 1}, kStep);
  const AuditFigures f = Audited(auditor, Stretched(1.0, 0.03f));
  EXPECT_EQ(f.audits, 1u);
  EXPECT_LT(f.error(), 1e-5);
  EXPECT_LT(f.mass_error(), 1e-5);
  EXPECT_FLOAT_EQ(f.predicted(), 0.03f);
  EXPECT_EQ(f.within_twice, 1u);
  EXPECT_LT(f.RatioQuantile(0.5), 0.05);
  EXPECT_NEAR(f.mass(), 1, 1e-5);  // without an index all is read
  EXPECT_EQ(f.recall(), 1);
}

TEST_F(AuditorTest, AnIndexThatPromisesMoreThanItKeepsIsSeenThrough) {
  indexes_->Set(kLayer, kKvHead, std::make_shared<EstimatingIndex>());
  Auditor auditor({.fraction = 1}, kStep);
  const AuditFigures f = Audited(auditor, Stretched(1.2, 0.05f));
  EXPECT_NEAR(f.error(), 0.2, 1e-4);
  EXPECT_NEAR(f.error_max, 0.2, 1e-4);
  EXPECT_EQ(f.within_twice, 0u);
  EXPECT_NEAR(f.RatioQuantile(0.5), 4, 0.4);
  EXPECT_EQ(subject_->fits, std::vector{IndexFit::kPoor});
}

TEST_F(AuditorTest, IndexesAreFoundNotToFitWhenMostOf16AuditsArePoor) {
  indexes_->Set(kLayer, kKvHead, std::make_shared<EstimatingIndex>());
  Auditor auditor({.fraction = 1}, kStep);
  for (int i = 0; i < 15; ++i) auditor.Offer(Stretched(i < 6 ? 1.08 : 1.2, 0.05f));
  auditor.Flush();
  EXPECT_EQ(auditor.stats().drifts, 0u);
  EXPECT_EQ(Audited(auditor, Stretched(1.08, 0.05f)).drifts, 1u);
  EXPECT_EQ(auditor.stats().drifts, 1u);
  EXPECT_EQ(std::count(subject_->fits.begin(), subject_->fits.end(), IndexFit::kPoor), 9);
}

TEST_F(AuditorTest, WithoutAnIndexThatAnswersNothingDrifts) {
  indexes_->Set(kLayer, kKvHead, std::make_shared<ListIndex>(All({300, 310})));
  Auditor auditor({.fraction = 1}, kStep);
  for (int i = 0; i < 20; ++i) auditor.Offer(Stretched(2, 0.05f));
  auditor.Flush();
  EXPECT_EQ(auditor.stats().done, 20u);
  EXPECT_TRUE(subject_->fits.empty());
}

TEST_F(AuditorTest, AMergedAnswerIsComparedMerged) {
  Auditor auditor({.fraction = 1}, kStep);
  constexpr TokenRange kPart{600, 1900};
  AuditedQuery query = Stretched(1.2, 0.05f, kPart);
  query.merged = true;
  query.rest_hi = kTokens - 10;
  // What the error of o over the range amounts to beside the rest.
  double worst = 0;
  for (uint32_t g = 0; g < kShape.group(); ++g) {
    const ReferenceHead part = Attention(g, All(kPart));
    const ReferenceHead whole = Attention(g, All({0, kTokens - 10}));
    const double share = std::exp(part.lse - whole.lse);
    const auto length = [](const ReferenceHead& a) {
      return std::sqrt(std::inner_product(a.o.begin(), a.o.end(), a.o.begin(), 0.0));
    };
    worst = std::max(worst, 0.2 * share * length(part) / length(whole));
  }
  EXPECT_NEAR(Audited(auditor, query).error(), worst, 1e-4);
}

TEST_F(AuditorTest, OfBudgetsThatDropTokensMassAndRecallAreThoseOfTheWorstHead) {
  constexpr uint32_t kTaken = 100;
  std::vector<std::vector<uint32_t>> taken;
  double least = 1;
  for (uint32_t g = 0; g < kShape.group(); ++g) {
    taken.push_back(Best(g, kRange));
    taken.back().resize(kTaken);
    least = std::min(least, MassOf(g, taken.back()));
  }
  AuditedQuery query = Query({.kind = Budget::Kind::kFixedK, .k = kTaken}, taken);
  query.predicted = static_cast<float>(1 - least);
  Auditor auditor({.fraction = 1}, kStep);
  const AuditFigures f = Audited(auditor, query);
  EXPECT_EQ(f.recall(), 1);
  EXPECT_NEAR(f.mass(), least, 1e-4);
  EXPECT_NEAR(f.mass_error(), 1 - least, 1e-4);
  EXPECT_NEAR(f.RatioQuantile(0.5), 1, 0.1);
  EXPECT_GT(f.error(), 0.05);
}

TEST_F(AuditorTest, TokensOfAnotherPositionAreComparedAsTheyAreUsed) {
  Place({2 * kBlockTokens, 5 * kBlockTokens}, 3 * kBlockTokens);
  Auditor auditor({.fraction = 1}, kStep);
  EXPECT_LT(Audited(auditor, Stretched(1.0, 0.03f)).error(), 1e-5);
  constexpr uint32_t kTaken = 100;
  std::vector<std::vector<uint32_t>> taken;
  for (uint32_t g = 0; g < kShape.group(); ++g) {
    taken.push_back(Best(g, kRange));
    taken.back().resize(kTaken);
  }
  const AuditFigures f =
      Audited(auditor, Query({.kind = Budget::Kind::kFixedK, .k = kTaken}, taken));
  EXPECT_EQ(f.audits, 2u);
  EXPECT_EQ(f.recall(), 1);
}

TEST_F(AuditorTest, UnderAToleratedErrorMassAndRecallAreOfTheTokensThatAreRead) {
  const KvSegments segments(kShape, kLayer, kKvHead, kRun, blocks_.data(), 0);
  const std::vector<KvView> views = {segments.view()};
  auto learned = LearnClusters(views, {}, {.group = kShape.group(), .scan_if_faster = false});
  ASSERT_OK(learned.status());
  const std::shared_ptr<const ClusterIndex> index = std::move(learned->indexes.front());
  indexes_->Set(kLayer, kKvHead, index);
  for (const float tolerated : {0.3f, 0.1f, 0.01f}) {
    // Of the run what is read beside the rest of the range, which is.
    const std::vector<TokenRange> ranges(kShape.group(), kRun);
    const QueryBlock queries{.q = q_.data(),
                             .queries = kShape.group(),
                             .head_dim = kShape.head_dim,
                             .scale = 0.25f,
                             .ranges = ranges};
    std::vector<float> acc(2 * q_.size());
    std::vector<Partial> rest(kShape.group()), answer(kShape.group());
    for (uint32_t g = 0; g < kShape.group(); ++g) {
      rest[g].acc = std::span(acc).subspan(g * kShape.head_dim, kShape.head_dim);
      answer[g].acc = std::span(acc).subspan(q_.size() + g * kShape.head_dim, kShape.head_dim);
    }
    for (const TokenRange part : {TokenRange{kRange.lo, kRun.lo}, TokenRange{kRun.hi, kRange.hi}}) {
      const std::vector<TokenRange> seen(kShape.group(), part);
      QueryBlock block = queries;
      block.ranges = seen;
      const KvSegments outside(kShape, kLayer, kKvHead, part, blocks_.data(), 0);
      ExactScan().AttendAll(outside.view(), block, rest);
    }
    const std::vector<float> lengths = {rest[0].LogLength(), rest[1].LogLength()};
    const ClusterRun run{index.get(), &views.front(), ranges};
    std::vector<uint32_t> read;
    SearchClusters({&run, 1}, queries, {.tolerance = tolerated, .other_length = lengths}, answer,
                   &read);
    for (uint32_t t : All(kRange)) {
      if (t < kRun.lo || t >= kRun.hi) read.push_back(t);
    }
    std::sort(read.begin(), read.end());
    double mass = 1, recall = 1;
    for (uint32_t g = 0; g < kShape.group(); ++g) {
      mass = std::min(mass, MassOf(g, read));
      std::vector<uint32_t> best = Best(g, kRange);
      best.resize(100);
      const auto hits = std::count_if(best.begin(), best.end(), [&](uint32_t token) {
        return std::binary_search(read.begin(), read.end(), token);
      });
      recall = std::min(recall, static_cast<double>(hits) / 100);
    }
    AuditedQuery query = Stretched(1, tolerated);
    query.budget.error = tolerated;
    const std::optional<AuditMeasure> measure =
        MeasureAudit(query, kShape, *table_, kStep, [] { return false; });
    ASSERT_TRUE(measure.has_value());
    EXPECT_NEAR(*measure->mass, mass, 1e-4) << tolerated;
    EXPECT_NEAR(*measure->recall, recall, 1e-6) << tolerated;
    EXPECT_LT(*measure->mass, tolerated > 0.05f ? 0.95 : 1.01);
    EXPECT_LT(measure->error, 1e-5);  // estimates are no loss by themselves
  }
}

TEST_F(AuditorTest, AnIndexThatHidesTheBestTokensLosesRecallAndIsFoundToFitPoorly) {
  // Outside the run all is scanned; of it only the worst 400 by the first head are listed.
  std::vector<uint32_t> listed = Best(0, kRun);
  listed.erase(listed.begin(), listed.end() - 400);
  std::sort(listed.begin(), listed.end());
  indexes_->Set(kLayer, kKvHead, std::make_shared<ListIndex>(listed));
  constexpr uint32_t kTaken = 600;
  std::vector<std::vector<uint32_t>> taken;
  double recall = 1;
  for (uint32_t g = 0; g < kShape.group(); ++g) {
    std::vector<uint32_t> known = listed;
    for (uint32_t t : All(kRange)) {
      if (t < kRun.lo || t >= kRun.hi) known.push_back(t);
    }
    std::sort(known.begin(), known.end(),
              [&](uint32_t a, uint32_t b) { return Score(g, a) > Score(g, b); });
    known.resize(kTaken);
    std::vector<uint32_t> best = Best(g, kRange);
    best.resize(kTaken);
    const auto hits = std::count_if(known.begin(), known.end(), [&](uint32_t token) {
      return std::find(best.begin(), best.end(), token) != best.end();
    });
    recall = std::min(recall, static_cast<double>(hits) / kTaken);
    taken.push_back(std::move(known));
  }
  AuditedQuery query = Query({.kind = Budget::Kind::kFixedK, .k = kTaken}, taken);
  query.predicted = 0.01f;  // as an index says that knows nothing of what it misses
  Auditor auditor({.fraction = 1}, kStep);
  const AuditFigures f = Audited(auditor, query);
  EXPECT_LT(recall, 0.5);
  EXPECT_NEAR(f.recall(), recall, 0.01);
  EXPECT_LT(f.mass(), 0.6);
  EXPECT_GT(f.RatioQuantile(0.5), 10);
  EXPECT_EQ(subject_->fits, std::vector{IndexFit::kPoor});
}

TEST_F(AuditorTest, ASearchThatIsDoneAgainIsStoppedBeforeEachRunAndBehindTheLast) {
  const auto index = std::make_shared<ListIndex>(All({300, 400}));
  indexes_->Set(kLayer, kKvHead, index);
  const std::vector<uint32_t> listed = All({300, 310});
  const AuditedQuery query =
      Query({.kind = Budget::Kind::kFixedK, .k = 10}, {listed, listed}, kRun);
  const auto measure = [&](const std::function<bool()>& stop) {
    index->searches = 0;
    return MeasureAudit(query, kShape, *table_, kStep, stop);
  };
  uint32_t asked = 0, asked_behind = 0;
  EXPECT_TRUE(measure([&] {
    ++asked;
    asked_behind += index->searches > 0;
    return false;
  }));
  EXPECT_EQ(asked_behind, kShape.group());
  // The exact answer's steps, the run's exact scores, its search, and each head's recall.
  EXPECT_EQ(asked, (kRun.size() + kStep - 1) / kStep + 2 + kShape.group());
  for (uint32_t last = 1; last <= asked; ++last) {
    uint32_t n = 0;
    EXPECT_FALSE(measure([&] { return ++n == last; }));
    EXPECT_EQ(n, last);
  }
}

TEST_F(AuditorTest, AnswersThatAreNoNumbersAreNotCounted) {
  Auditor auditor({.fraction = 1}, kStep);
  AuditedQuery o = Stretched(1, 0), lse = Stretched(1, 0);
  o.o[3] = lse.lse[1] = NAN;
  auditor.Offer(o);
  auditor.Offer(lse);
  auditor.Flush();
  EXPECT_EQ(auditor.stats().given_up, 2u);
  EXPECT_TRUE(auditor.Of("alice").empty());
}

TEST_F(AuditorTest, OnlyTheTenantSeesItsModels) {
  Auditor auditor({.fraction = 1}, kStep);
  Audited(auditor, Stretched(1, 0));
  EXPECT_TRUE(auditor.Of("bob").empty());
  auto bob = std::make_shared<FakeSubject>(subject_->Memory());
  bob->tenant_ = "bob";
  AuditedQuery query = Stretched(1, 0);
  query.subject = bob;
  auditor.Offer(query);
  auditor.Flush();
  EXPECT_EQ(auditor.Of("alice").front().figures.audits, 1u);
  EXPECT_EQ(auditor.Of("bob").front().figures.audits, 1u);
  ASSERT_EQ(auditor.OfAll().size(), 1u);  // models of one name together
  EXPECT_EQ(auditor.OfAll().front().figures.audits, 2u);
}

TEST_F(AuditorTest, TheFractionIsThatOfTheAnswersDrawn) {
  Auditor none({.fraction = 0}, kStep), some({.fraction = 1.0 / 64}, kStep),
      all({.fraction = 1}, kStep);
  int drawn_none = 0, drawn_some = 0, drawn_all = 0;
  for (int i = 0; i < 64000; ++i) {
    drawn_none += none.Draw();
    drawn_some += some.Draw();
    drawn_all += all.Draw();
  }
  EXPECT_EQ(drawn_none, 0);
  EXPECT_NEAR(drawn_some, 1000, 150);
  EXPECT_EQ(drawn_all, 64000);
}

// The audit waits inside the first subject while others are offered.
TEST_F(AuditorTest, AFullQueuePassesAnswersByAndADrainLetsGoOfIt) {
  absl::Notification asked, answer;
  Auditor auditor({.fraction = 1, .queue = 3}, kStep);
  subject_->asked = &asked;
  subject_->answer = &answer;
  auditor.Offer(Stretched(1, 0));
  asked.WaitForNotification();
  auto other = std::make_shared<FakeSubject>(nullptr);
  AuditedQuery query = Stretched(1, 0);
  query.subject = other;
  for (int i = 0; i < 5; ++i) auditor.Offer(query);
  EXPECT_EQ(auditor.stats().queued, 3u);
  EXPECT_EQ(auditor.stats().full, 2u);
  EXPECT_EQ(other.use_count(), 1);  // what waits holds nothing
  auditor.Drain();
  EXPECT_EQ(auditor.stats().queued, 0u);
  auditor.Offer(query);
  EXPECT_EQ(auditor.stats().full, 3u);
  answer.Notify();
  auditor.Flush();
  EXPECT_EQ(auditor.stats().done, 0u);  // the drain ended it between two steps
  EXPECT_EQ(auditor.stats().given_up, 1u);
}

TEST_F(AuditorTest, ASubjectThatIsClosedWhileItIsAuditedIsLetGo) {
  absl::Notification asked, answer;
  Auditor auditor({.fraction = 1}, kStep);
  subject_->asked = &asked;
  subject_->answer = &answer;
  auditor.Offer(Stretched(1, 0));
  asked.WaitForNotification();
  subject_->Close();
  auditor.LetGo(absl::Milliseconds(50));  // it is not, yet
  EXPECT_EQ(auditor.stats().given_up, 0u);
  answer.Notify();
  auditor.LetGo(testing::kPatience);
  EXPECT_EQ(auditor.stats().given_up, 1u);
  AuditedQuery gone = Stretched(1, 0);
  gone.subject = std::make_shared<FakeSubject>(nullptr);  // and ended
  auditor.Offer(gone);
  auditor.Flush();
  EXPECT_EQ(auditor.stats().given_up, 2u);
  EXPECT_TRUE(auditor.OfAll().empty());
}

}  // namespace
}  // namespace quarry
