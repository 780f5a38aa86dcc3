// Audits of live answers through the engine: what they find is what a reference in double finds,
// and what follows from it.
#include <cmath>
#include <functional>
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kRunTokens = 4096, kRuns = 2, kFirst = 128;
constexpr uint32_t kTokens = kFirst + kRuns * kRunTokens + 600;  // the last run is published
constexpr TokenRange kRange = {kFirst, kTokens - 512};
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};
constexpr uint64_t kHeads = 2;  // (layer, KV head) pairs

KvShape AuditedShape() { return {.layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 64}; }

class EngineAuditTest : public EngineTest {
 protected:
  void StartAudited(const std::function<void(EngineOptions&)>& change = {}) {
    EngineOptions options = SmallOptions();
    options.run_tokens = kRunTokens;
    options.first_run_token = kFirst;
    options.index.threads = 2;
    options.audit.fraction = 1;
    options.audit.queue = 65536;
    if (change) change(options);
    Start(options);
  }
  static void Clustered(EngineOptions& options) {
    options.index.choice.kind = IndexKind::kClusters;
  }
  ContextId OpenFilled() {
    return OpenAndFill(session_,
                       OpenFor(SmallModel(AuditedShape()), Tokens(kTokens), kTokens + 1024), data_)
        .context;
  }
  // The heads' figures when so many audits are done.
  std::vector<HeadAudit> Audited(uint64_t audits) {
    WaitFor([&](const EngineStats& s) { return s.audit.done >= audits; });
    auto heads = engine_->Audits(session_);
    EXPECT_TRUE(heads.ok()) << heads.status();
    return heads.value_or(std::vector<HeadAudit>{});
  }
  std::unique_ptr<OwnedRow> Ask(ContextId context, const Budget& budget, uint64_t seed) {
    auto row = AttendOne(*engine_, session_, AuditedShape(), context, 0, kRange, seed, budget);
    EXPECT_TRUE(row->answer.status.ok()) << row->answer.status;
    return row;
  }
  // The worst ||o - exact|| / ||exact|| and the least e^(lse - exact lse) of one KV head's group.
  struct Truth {
    double error = 0, mass = 1;
  };
  Truth TruthOf(const OwnedRow& row, uint32_t kv_head) const {
    Truth truth;
    for (uint32_t h = kv_head * 2; h < kv_head * 2 + 2; ++h) {
      const float* const o = row.o.data() + size_t{h} * row.shape.head_dim;
      const ReferenceHead exact =
          ReferenceAttention(data_, 0, row.row.range, row.q.data() + size_t{h} * row.shape.head_dim,
                             h, [](uint32_t) { return true; });
      double difference = 0, length = 0;
      for (uint32_t d = 0; d < row.shape.head_dim; ++d) {
        difference += std::pow(o[d] - exact.o[d], 2);
        length += exact.o[d] * exact.o[d];
      }
      truth.error = std::max(truth.error, std::sqrt(difference / length));
      truth.mass = std::min(truth.mass, std::exp(row.lse[h] - exact.lse));
    }
    return truth;
  }

  const KvData data_{AuditedShape(), kTokens, SteadySeed()};
};

TEST_F(EngineAuditTest, EachAnswerUnderABudgetIsAuditedAsTheReferenceSees) {
  StartAudited();
  const ContextId context = OpenFilled();
  const auto row = Ask(context, {Budget::Kind::kFixedK, 300}, SteadySeed());
  Ask(context, {}, SteadySeed());  // exact, so there is nothing to audit
  const std::vector<HeadAudit> heads = Audited(kHeads);
  ASSERT_EQ(heads.size(), kHeads);
  for (const HeadAudit& head : heads) {
    const Truth truth = TruthOf(*row, head.kv_head);
    EXPECT_EQ(head.model, "small");
    EXPECT_EQ(head.layer, 0u);
    EXPECT_EQ(head.figures.audits, 1u);
    EXPECT_NEAR(head.figures.error(), truth.error, 2e-3 + 0.01 * truth.error);
    EXPECT_NEAR(head.figures.mass(), truth.mass, 2e-3);
    EXPECT_EQ(head.figures.recall(), 1);
    EXPECT_NEAR(head.figures.predicted(), 1 - truth.mass, 2e-3);
    EXPECT_EQ(head.figures.within_twice, 1u);
  }
  EXPECT_EQ(engine_->Stats().audit.done, kHeads);
}

TEST_F(EngineAuditTest, EstimatesOfIndexesAreComparedWithWhatTheyPredicted) {
  StartAudited(Clustered);
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  const auto row = Ask(context, kWithinError, SteadySeed());
  double predicted = 0;
  for (const HeadAudit& head : Audited(kHeads)) {
    const Truth truth = TruthOf(*row, head.kv_head);
    EXPECT_NEAR(head.figures.error(), truth.error, 2e-3 + 0.02 * truth.error);
    // Keys of one length have no tokens far above others: most are estimated.
    EXPECT_EQ(head.figures.mass_audits, 1u);
    EXPECT_GT(head.figures.mass(), 0);
    EXPECT_LT(head.figures.mass(), 0.9);
    EXPECT_EQ(head.figures.recall_audits, 1u);
    predicted = std::max(predicted, head.figures.predicted());
    EXPECT_NEAR(head.figures.RatioQuantile(0.5), truth.error / head.figures.predicted(),
                0.2 * truth.error / head.figures.predicted());
  }
  EXPECT_FLOAT_EQ(static_cast<float>(predicted), row->answer.error_estimate);
}

TEST_F(EngineAuditTest, RowsThatAreMergedElsewhereAreAuditedMerged) {
  StartAudited(Clustered);
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  std::unique_ptr<OwnedRow> rows[1] = {
      std::make_unique<OwnedRow>(AuditedShape(), context, 0, kRange, SteadySeed())};
  OwnedRow& row = *rows[0];
  row.row.budget = kWithinError;
  row.row.merged = true;
  row.row.token_position = kTokens - 1;
  AttendRows(*engine_, session_, rows);
  ASSERT_OK(row.answer.status);
  for (const HeadAudit& head : Audited(kHeads)) {
    double worst = 0;
    for (uint32_t h = head.kv_head * 2; h < head.kv_head * 2 + 2; ++h) {
      const float* const q = row.q.data() + size_t{h} * 64;
      const auto over = [&](auto keep) {
        return ReferenceAttention(data_, 0, {0, kTokens}, q, h, keep);
      };
      const ReferenceHead whole = over([](uint32_t) { return true; });
      const ReferenceHead rest = over([](uint32_t t) { return t < kRange.lo || t >= kRange.hi; });
      const double total = std::log(std::exp(rest.lse) + std::exp(row.lse[h]));
      double difference = 0, length = 0;
      for (uint32_t d = 0; d < 64; ++d) {
        const double o = std::exp(rest.lse - total) * rest.o[d] +
                         std::exp(row.lse[h] - total) * row.o[size_t{h} * 64 + d];
        difference += std::pow(o - whole.o[d], 2);
        length += whole.o[d] * whole.o[d];
      }
      worst = std::max(worst, std::sqrt(difference / length));
    }
    EXPECT_NEAR(head.figures.error(), worst, 2e-3 + 0.02 * worst);
  }
}

TEST_F(EngineAuditTest, AnotherTenantSeesNothingOfIt) {
  StartAudited();
  Ask(OpenFilled(), {Budget::Kind::kFixedK, 300}, SteadySeed());
  EXPECT_EQ(Audited(kHeads).size(), kHeads);
  const auto seen = engine_->Audits(NewSession("bob"));
  ASSERT_TRUE(seen.ok()) << seen.status();
  EXPECT_TRUE(seen->empty());
  EXPECT_EQ(engine_->Audits(NewSession("alice"))->size(), kHeads);
  EXPECT_TRUE(absl::IsNotFound(engine_->Audits(SessionId{12345}).status()));
}

TEST_F(EngineAuditTest, IndexesThatDoNotFitAreLearnedAgainFromTheLiveQueriesThatFollow) {
  StartAudited([](EngineOptions& options) {
    Clustered(options);
    options.index.query_samples = 16;   // too few to be learned again for their number
    options.audit.drift_factor = 0.01;  // every error is too large for it
  });
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  uint32_t asked = 0;
  for (; asked < 16; ++asked) Ask(context, kWithinError, asked);
  WaitFor([](const EngineStats& s) { return s.audit.drifts == 1; });
  EXPECT_EQ(engine_->Stats().index.relearned, 0u);
  // One in 16 is sampled, and half of what is kept must be new.
  for (; asked < 16 + 16 * 8; ++asked) Ask(context, kWithinError, asked);
  WaitFor([](const EngineStats& s) {
    return s.index.relearned == kRuns && s.index.built == 2 * kHeads * kRuns;
  });
}

TEST_F(EngineAuditTest, RunsThatOnlyAForkHasAreLearnedAgainTooOnceItIsAsked) {
  StartAudited([](EngineOptions& options) {
    Clustered(options);
    options.index.query_samples = 16;
    options.audit.drift_factor = 0.01;
  });
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  constexpr uint32_t kShared = kFirst + kRunTokens;
  const auto fork = engine_->Fork(session_, {context, kShared, kTokens, {}});
  ASSERT_OK(fork.status());
  ASSERT_OK(engine_->DeclareTokens(session_, *fork, Tokens(kTokens - kShared, 500000)));
  ASSERT_OK(AppendAll(*engine_, session_, *fork, data_, {kShared, kTokens}));
  WaitForBuilt(kHeads * (kRuns + 1));
  uint32_t asked = 0;
  for (; asked < 16; ++asked) Ask(context, kWithinError, asked);
  WaitFor([](const EngineStats& s) { return s.audit.drifts == 1; });
  for (; asked < 16 + 16 * 8; ++asked) Ask(context, kWithinError, asked);
  WaitFor([](const EngineStats& s) { return s.index.relearned == kRuns; });
  for (; asked < 16 + 16 * 9; ++asked) Ask(*fork, kWithinError, asked);
  WaitFor([](const EngineStats& s) {
    return s.index.relearned == kRuns + 1 && s.index.queued_runs == 0;
  });
}

TEST_F(EngineAuditTest, WhereErrorsAreAsPredictedNothingIsLearnedAgain) {
  StartAudited([](EngineOptions& options) {
    Clustered(options);
    options.audit.drift_factor = 1000;
  });
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  for (uint32_t i = 0; i < 40; ++i) Ask(context, kWithinError, i);
  Audited(40 * kHeads);
  EXPECT_EQ(engine_->Stats().audit.drifts, 0u);
}

TEST_F(EngineAuditTest, AClosedContextsMemoryIsGivenBack) {
  StartAudited(Clustered);
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  for (uint32_t i = 0; i < 50; ++i) Ask(context, kWithinError, i);
  EXPECT_OK(engine_->Close(session_, context));
  WaitUntilUnleased();
  WaitFor([](const EngineStats& s) { return s.audit.done + s.audit.given_up == 50 * kHeads; });
}

TEST_F(EngineAuditTest, OffAndDrainedNothingIsAudited) {
  StartAudited([](EngineOptions& options) { options.audit.fraction = 0; });
  Ask(OpenFilled(), {Budget::Kind::kFixedK, 300}, SteadySeed());
  AuditStats stats = engine_->Stats().audit;
  EXPECT_EQ(stats.queued + stats.done + stats.full + stats.given_up, 0u);

  StartAudited();
  const ContextId context = OpenFilled();
  engine_->Drain();
  Ask(context, {Budget::Kind::kFixedK, 300}, SteadySeed());
  stats = engine_->Stats().audit;
  EXPECT_EQ(stats.full, kHeads);
  EXPECT_EQ(stats.done, 0u);
}

}  // namespace
}  // namespace quarry
