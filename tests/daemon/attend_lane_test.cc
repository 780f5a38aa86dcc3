// What a lane asks of indexes: only those that can answer, and with what is known of the rest.
#include "daemon/attend_lane.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "daemon/run_registry.h"
#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {
    .layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 16, .dtype = DType::kFp32};
constexpr uint32_t kTokens = 2560;
constexpr TokenRange kRun{128, 2176}, kTail{2176, 2304}, kBefore{0, 128}, kBehind{2304, kTokens};
constexpr float kDoubt = -1.0f, kLength = 2.0f;

// Estimates a run as one group, without any error; remembers what it was asked.
class GroupIndex final : public KeyIndex {
 public:
  std::string_view kind() const override { return "group"; }
  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override {
    ExactScan().AttendAll(run, queries, acc);
  }
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override {
    tolerance = queries.tolerance;
    other_length.assign(queries.other_length.begin(), queries.other_length.end());
    out->Clear();
    out->tokens = run.tokens();
    out->nodes = 1;
    out->stretches = {{1, run.tokens().size()}};
    out->score.assign(queries.queries, 0);
    out->doubt.assign(queries.queries, kDoubt);
    out->length.assign(queries.queries, kLength);
  }
  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores&,
              const RunAllotment&, std::span<Partial> acc) const override {
    ExactScan().AttendAll(run, queries, acc);
  }

  mutable float tolerance = -1;  // as asked last; -1: never
  mutable std::vector<float> other_length;
};

class AttendLaneTest : public ::testing::Test {
 protected:
  AttendLaneTest() {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 16 << 20;
    options.arena.extent_bytes = 1 << 20;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    store_ = *BlockStore::Create(options);
    const uint64_t bytes = kShape.bytes_per_token() * kBlockTokens;
    constexpr uint32_t kBlocks = kTokens / kBlockTokens;
    EXPECT_OK(store_->Reserve("t", bytes, kBlocks));
    std::mt19937_64 random(Seed());
    std::normal_distribution<float> normal;
    for (uint32_t b = 0; b < kBlocks; ++b) {
      blocks_.push_back(
          std::make_shared<HeldBlock>(*store_, *store_->Begin("t", bytes), BlockOrigin{}));
      for (uint64_t at = 0; at < bytes; at += 4) {
        const float x = normal(random);
        std::memcpy(blocks_.back()->writable() + at, &x, 4);
      }
    }
    for (float& x : q_) x = normal(random);
    run_ = std::make_unique<quarry::Run>(kRun, blocks_, nullptr);
    units_ = {UnitOf(kRun), UnitOf(kTail)};
    units_[0].run = run_.get();
    units_[0].first_block = 0;
    units_[0].blocks = run_->blocks().data();
    rest_ = {UnitOf(kBefore), UnitOf(kBehind)};
  }

  ScanUnit UnitOf(TokenRange tokens) const {
    ScanUnit unit;
    unit.tokens = tokens;
    unit.first_block = tokens.lo / kBlockTokens;
    unit.blocks = &blocks_[unit.first_block];
    unit.members = {0};
    unit.ranges = {tokens};
    return unit;
  }

  const float* Vector(KvPart part, uint32_t token) const {
    const std::byte* block = blocks_[token / kBlockTokens]->data();
    return reinterpret_cast<const float*>(block + kShape.strip_offset(0, part, 0) +
                                          token % kBlockTokens * kShape.vector_bytes());
  }
  // The sums of e^score * value, with that of e^score behind them.
  std::vector<double> Sums(uint32_t head, std::initializer_list<TokenRange> ranges) const {
    std::vector<double> sums(kShape.head_dim + 1);
    for (const TokenRange& range : ranges) {
      for (uint32_t t = range.lo; t < range.hi; ++t) {
        double score = 0;
        for (uint32_t d = 0; d < kShape.head_dim; ++d) {
          score += double{q_[head * kShape.head_dim + d]} * Vector(KvPart::kKey, t)[d];
        }
        const double weight = std::exp(score / 4);
        for (uint32_t d = 0; d < kShape.head_dim; ++d) {
          sums[d] += weight * Vector(KvPart::kValue, t)[d];
        }
        sums.back() += weight;
      }
    }
    return sums;
  }
  static double LogLength(std::span<const double> sums) {
    double square = 0;
    for (double x : sums.first(kShape.head_dim)) square += x * x;
    return 0.5 * std::log(square);
  }

  // Runs a lane; the run is answered by `index`.
  LaneResult Answer(const Budget& budget, std::span<const ScanUnit> rest) {
    const LaneMember member{q_.data(), budget, 7, o_.data(), lse_.data()};
    const KeyIndex* indexes[] = {&index_, &ExactScan()};
    LaneKey key{.shape = &kShape, .kind = ScanKind::kIndexed};
    key.samples = budget.kind == Budget::Kind::kSoftmaxLift;
    key.tolerance = budget.kind == Budget::Kind::kError ? budget.error : 0;
    AttendLane lane(key, {&member, 1}, units_, indexes, rest);
    do {
      for (uint32_t i = 0, n = lane.tasks(); i < n; ++i) {
        lane.RunTask(i);
        EXPECT_EQ(lane.TaskDone(), i + 1 == n);
      }
    } while (lane.NextPhase());
    lane.Finish();
    return lane.results().front();
  }
  void ExpectAnswerOfTheRange(double tolerance) const {
    for (uint32_t h = 0; h < 2; ++h) {
      const std::vector<double> want = Sums(h, {kRun, kTail});
      EXPECT_NEAR(lse_[h], std::log(want.back()), tolerance);
      for (uint32_t d = 0; d < kShape.head_dim; ++d) {
        EXPECT_NEAR(o_[h * kShape.head_dim + d], want[d] / want.back(), tolerance);
      }
    }
  }

  std::unique_ptr<BlockStore> store_;
  std::vector<std::shared_ptr<HeldBlock>> blocks_;
  std::unique_ptr<quarry::Run> run_;  // a test has a Run() of its own
  std::vector<ScanUnit> units_, rest_;
  const GroupIndex index_;
  std::vector<float> q_ = std::vector<float>(2 * kShape.head_dim);
  std::vector<float> o_ = std::vector<float>(2 * kShape.head_dim);
  std::vector<float> lse_ = std::vector<float>(2);
};

constexpr Budget kTolerant{.kind = Budget::Kind::kError, .error = 0.25f};

TEST_F(AttendLaneTest, AnIndexIsToldOfTheTailThatIsAttendedWhole) {
  const LaneResult result = Answer(kTolerant, {});
  EXPECT_EQ(index_.tolerance, kTolerant.error);
  ASSERT_EQ(index_.other_length.size(), 2u);
  double predicted = 0;
  for (uint32_t h = 0; h < 2; ++h) {
    const double tail = LogLength(Sums(h, {kTail}));
    EXPECT_NEAR(index_.other_length[h], tail, 1e-4);
    const double length = std::hypot(std::exp(double{kLength}), std::exp(tail));
    predicted = std::max(predicted, std::exp(double{kDoubt}) / length);
  }
  EXPECT_NEAR(result.error_estimate, predicted, 0.07 * predicted);  // bins of an eighth of a nat
  ExpectAnswerOfTheRange(1e-4);
}

TEST_F(AttendLaneTest, WhatAnAnswerIsMergedWithCountsForErrorsButIsNoPartOfIt) {
  const LaneResult alone = Answer(kTolerant, {});
  const LaneResult merged = Answer(kTolerant, rest_);
  ASSERT_EQ(index_.other_length.size(), 2u);
  for (uint32_t h = 0; h < 2; ++h) {
    EXPECT_NEAR(index_.other_length[h], LogLength(Sums(h, {kBefore, kTail, kBehind})), 1e-4);
  }
  ExpectAnswerOfTheRange(1e-4);
  EXPECT_EQ(merged.tokens, alone.tokens);
  const uint64_t rest = kBefore.size() + kBehind.size();
  EXPECT_EQ(merged.bytes, alone.bytes + rest * 2 * kShape.vector_bytes());
}

TEST_F(AttendLaneTest, AnIndexThatCannotSampleIsPassedByAndTheRunIsSampledExactly) {
  const Budget all{.kind = Budget::Kind::kSoftmaxLift, .k = kTokens};
  Answer(all, {});
  EXPECT_EQ(index_.tolerance, -1);  // never asked
  ExpectAnswerOfTheRange(1e-4);
  const Budget few{.kind = Budget::Kind::kSoftmaxLift, .k = 500};
  const LaneResult sampled = Answer(few, {});
  EXPECT_EQ(sampled.tokens, 2u * 500);
  EXPECT_GT(sampled.error_estimate, 0);
  for (uint32_t h = 0; h < 2; ++h) {
    EXPECT_NEAR(lse_[h], std::log(Sums(h, {kRun, kTail}).back()), 6 * sampled.error_estimate);
  }
}

}  // namespace
}  // namespace quarry
