// What a lane asks of indexes: only those that can answer, and with what is known of the rest.
#include "daemon/attend_lane.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu_index/cluster_learn.h"
#include "tests/daemon/held_tokens.h"

namespace quarry {
namespace {

constexpr KvShape kShape = HeldTokens::kShape;
constexpr uint32_t kTokens = 2560, kGroup = 2, kHeadDim = kShape.head_dim;
constexpr TokenRange kBefore{0, 128}, kFirst{128, 1152}, kSecond{1152, 2176}, kTail{2176, 2304},
    kBehind{2304, kTokens};
constexpr Budget kTolerant{.kind = Budget::Kind::kError, .error = 0.05f};

// Two runs with clusters of one model, and a tail.
class AttendLaneTest : public ::testing::Test {
 protected:
  struct Cut {
    std::shared_ptr<const quarry::Run> run;  // a test has a Run() of its own
    std::unique_ptr<KvSegments> segments;
    std::unique_ptr<ClusterIndex> index;
  };

  AttendLaneTest() {
    std::vector<KvView> views;
    for (const TokenRange tokens : {kFirst, kSecond}) {
      cuts_.push_back({held_.RunOf(tokens), held_.Segments(tokens), nullptr});
      views.push_back(cuts_.back().segments->view());
    }
    LearnedClusters learned = *LearnClusters(views, sampled_, {.scan_if_faster = false});
    for (size_t r = 0; r < 2; ++r) cuts_[r].index = std::move(learned.indexes[r]);
    units_ = {UnitOf(kFirst, 0), UnitOf(kSecond, 1), UnitOf(kTail)};
    rest_ = {UnitOf(kBefore), UnitOf(kBehind)};
  }
  static std::vector<float> Scaled(std::vector<float> q) {
    for (float& x : q) x *= 0.25f;
    return q;
  }

  // `run`: whose index may answer; -1: none. Of the first member.
  ScanUnit UnitOf(TokenRange tokens, int run = -1) const {
    ScanUnit unit;
    unit.tokens = tokens;
    unit.members = {0};
    unit.ranges = {tokens};
    if (run >= 0) {
      unit.run = cuts_[run].run.get();
      unit.run_tokens = unit.run->tokens();
      unit.first_block = unit.run_tokens.lo / kBlockTokens;
      unit.blocks = unit.run->blocks().data();
    } else {
      unit.first_block = tokens.lo / kBlockTokens;
      unit.blocks = &held_.blocks()[unit.first_block];
    }
    return unit;
  }

  struct Answer {
    std::vector<float> o, lse;  // [members][group][head_dim]
    std::vector<LaneResult> results;
  };
  // Runs a lane of as many members as budgets; runs are answered by their clusters.
  Answer Ask(std::span<const Budget> budgets, std::span<const ScanUnit> rest = {}) {
    Answer answer{std::vector<float>(budgets.size() * kGroup * kHeadDim),
                  std::vector<float>(budgets.size() * kGroup), {}};
    std::vector<LaneMember> members;
    for (size_t m = 0; m < budgets.size(); ++m) {
      members.push_back({Query(m, 0).data(), budgets[m], 7,
                         answer.o.data() + m * kGroup * kHeadDim, answer.lse.data() + m * kGroup});
    }
    std::vector<const KeyIndex*> indexes;
    for (const ScanUnit& unit : units_) indexes.push_back(IndexOf(unit));
    LaneKey key{.shape = &kShape, .kind = ScanKind::kIndexed};
    key.samples = budgets[0].kind == Budget::Kind::kSoftmaxLift;
    key.tolerance = budgets[0].kind == Budget::Kind::kError ? budgets[0].error : 0;
    AttendLane lane(key, members, units_, indexes, rest, search_parts_);
    do {
      for (uint32_t i = 0, n = lane.tasks(); i < n; ++i) {
        lane.RunTask(i);
        EXPECT_EQ(lane.TaskDone(), i + 1 == n);
      }
    } while (lane.NextPhase());
    lane.Finish();
    answer.results.assign(lane.results().begin(), lane.results().end());
    return answer;
  }
  Answer Ask(const Budget& budget, std::span<const ScanUnit> rest = {}) {
    return Ask(std::span(&budget, 1), rest);
  }
  const KeyIndex* IndexOf(const ScanUnit& unit) const {
    for (const Cut& cut : cuts_) {
      if (unit.run == cut.run.get()) return cut.index.get();
    }
    return &ExactScan();
  }
  std::span<const float> Query(size_t member, size_t head) const {
    return std::span(q_).subspan((member * kGroup + head) * kHeadDim, kHeadDim);
  }

  void ExpectAttended(const Answer& answer, size_t member, std::initializer_list<TokenRange> ranges,
                      double tolerance) const {
    for (size_t h = 0; h < kGroup; ++h) {
      const std::vector<double> want = held_.Sums(Query(member, h), ranges);
      EXPECT_NEAR(answer.lse[member * kGroup + h], std::log(want.back()), tolerance);
      double difference = 0, length = 0;
      for (uint32_t d = 0; d < kHeadDim; ++d) {
        const double o = want[d] / want.back();
        difference += std::pow(answer.o[(member * kGroup + h) * kHeadDim + d] - o, 2);
        length += o * o;
      }
      EXPECT_LT(std::sqrt(difference / length), tolerance);
    }
  }

  // What families of runs answer beside tokens that are attended whole, of which the first
  // `own` count as parts of the answer.
  struct Wanted {
    std::vector<float> o, lse;
    uint64_t tokens = 0, bytes = 0;
  };
  Wanted Search(const std::vector<std::vector<size_t>>& families,
                const std::vector<TokenRange>& whole, size_t own) const {
    std::vector<float> acc(kGroup * kHeadDim), all_acc(acc.size());
    std::vector<Partial> partials(kGroup), all(kGroup);
    for (size_t h = 0; h < kGroup; ++h) {
      partials[h].acc = std::span(acc).subspan(h * kHeadDim, kHeadDim);
      all[h].acc = std::span(all_acc).subspan(h * kHeadDim, kHeadDim);
    }
    const std::vector<TokenRange> ranges(kGroup, TokenRange{0, kTokens});
    QueryBlock block{q_.data(), DType::kFp32, kGroup, kHeadDim, 0.25f, ranges};
    for (size_t i = 0; i < whole.size(); ++i) {
      const auto segments = held_.Segments(whole[i]);
      if (i < own) ExactScan().AttendAll(segments->view(), block, partials);
      ExactScan().AttendAll(segments->view(), block, all);
    }
    std::vector<float> lengths;
    for (const Partial& partial : all) {
      double square = 0;
      for (const float x : partial.acc) square += double{x} * x;
      lengths.push_back(partial.max + static_cast<float>(0.5 * std::log(square)));
    }
    ClusterLimits limits;
    limits.tolerance = kTolerant.error;
    limits.other_length = lengths;
    for (const std::vector<size_t>& family : families) {
      std::vector<ClusterRun> runs;
      for (const size_t r : family) {
        runs.push_back({cuts_[r].index.get(), &cuts_[r].segments->view(), ranges});
      }
      SearchClusters(runs, block, limits, partials);
    }
    Wanted wanted{std::vector<float>(acc.size()), {}};
    for (size_t h = 0; h < kGroup; ++h) {
      wanted.lse.push_back(
          partials[h].Finish(std::span(wanted.o).subspan(h * kHeadDim, kHeadDim)));
      wanted.tokens += partials[h].tokens;
      wanted.bytes += partials[h].bytes;
    }
    return wanted;
  }
  void ExpectSame(const Answer& answer, const Wanted& wanted) const {
    ASSERT_EQ(answer.o.size(), wanted.o.size());
    for (size_t i = 0; i < wanted.o.size(); ++i) EXPECT_NEAR(answer.o[i], wanted.o[i], 1e-4);
    for (size_t h = 0; h < kGroup; ++h) EXPECT_NEAR(answer.lse[h], wanted.lse[h], 1e-4);
    EXPECT_EQ(answer.results[0].tokens, wanted.tokens);
  }

  HeldTokens held_{kTokens};
  const std::vector<float> sampled_ = Scaled(held_.Queries(40));
  const std::vector<float> q_ = held_.Queries(3);
  std::vector<Cut> cuts_;
  std::vector<ScanUnit> units_, rest_;
  uint32_t search_parts_ = 1;
};

TEST_F(AttendLaneTest, RunsOfOneModelAreSearchedAtOnceBesideTheTailThatIsAttendedWhole) {
  const Answer answer = Ask(kTolerant);
  const Wanted wanted = Search({{0, 1}}, {kTail}, 1);
  ExpectSame(answer, wanted);
  EXPECT_EQ(answer.results[0].bytes, wanted.bytes);
  EXPECT_GT(answer.results[0].error_estimate, 0);
  EXPECT_LT(answer.results[0].error_estimate, 3 * kTolerant.error);
  ExpectAttended(answer, 0, {kFirst, kSecond, kTail}, 0.2);
}

TEST_F(AttendLaneTest, ASearchInPartsAnswersAsOneDoes) {
  const Answer one = Ask(kTolerant, rest_);
  search_parts_ = 5;  // more than there are runs
  const Answer cut = Ask(kTolerant, rest_);
  EXPECT_EQ(cut.results[0].tokens, one.results[0].tokens);
  EXPECT_EQ(cut.results[0].bytes, one.results[0].bytes);
  EXPECT_NEAR(cut.results[0].error_estimate, one.results[0].error_estimate, 1e-4);
  for (size_t i = 0; i < one.o.size(); ++i) EXPECT_NEAR(cut.o[i], one.o[i], 1e-4);
  for (size_t h = 0; h < kGroup; ++h) EXPECT_NEAR(cut.lse[h], one.lse[h], 1e-4);
}

TEST_F(AttendLaneTest, FamiliesInPartsAndOfOneRunAreSearchedTogether) {
  units_[1].members = {0, 1};
  units_[1].ranges = {kSecond, kSecond};
  units_[0].members = {0, 1};
  units_[0].ranges = {kFirst, kFirst};
  units_.push_back(UnitOf(kSecond, 1));
  units_.back().members = {2};
  const Budget budgets[] = {kTolerant, kTolerant, kTolerant};
  search_parts_ = 2;
  const Answer answer = Ask(budgets);
  ExpectAttended(answer, 0, {kFirst, kSecond, kTail}, 0.2);
  ExpectAttended(answer, 1, {kFirst, kSecond}, 0.2);
  ExpectAttended(answer, 2, {kSecond}, 0.2);
}

TEST_F(AttendLaneTest, RunsOfDifferentModelsAreSearchedEachAlone) {
  LearnedClusters other =
      *LearnClusters({&cuts_[1].segments->view(), 1}, sampled_, {.scan_if_faster = false});
  cuts_[1].index = std::move(other.indexes[0]);
  const Answer answer = Ask(kTolerant);
  const Wanted wanted = Search({{0}, {1}}, {kTail}, 1);
  ExpectSame(answer, wanted);
  EXPECT_EQ(answer.results[0].bytes, wanted.bytes);
  ExpectAttended(answer, 0, {kFirst, kSecond, kTail}, 0.2);
}

TEST_F(AttendLaneTest, WhatAnAnswerIsMergedWithCountsForErrorsButIsNoPartOfIt) {
  const Answer merged = Ask(kTolerant, rest_);
  const Wanted wanted = Search({{0, 1}}, {kTail, kBefore, kBehind}, 1);
  ExpectSame(merged, wanted);
  const uint64_t rest = kBefore.size() + kBehind.size();
  EXPECT_EQ(merged.results[0].bytes, wanted.bytes + rest * 2 * kShape.vector_bytes());
  // By the length of the merged answer.
  EXPECT_LT(merged.results[0].error_estimate, 3 * kTolerant.error);
  ExpectAttended(merged, 0, {kFirst, kSecond, kTail}, 0.3);
}

TEST_F(AttendLaneTest, WithoutATailRunsAreSearchedForThemselves) {
  units_.pop_back();
  const Answer answer = Ask(kTolerant);
  ExpectAttended(answer, 0, {kFirst, kSecond}, 0.2);
  EXPECT_GT(answer.results[0].error_estimate, 0);
}

TEST_F(AttendLaneTest, MembersThatShareSomeRunsOnlyEachGetTheirOwn) {
  units_[0].members = {0, 1, 2};
  units_[0].ranges = {kFirst, kFirst, {kFirst.lo + 100, kFirst.hi - 300}};
  units_[1].members = {0, 2};
  units_[1].ranges = {kSecond, {kSecond.lo, kSecond.lo + 1}};
  const Budget budgets[] = {kTolerant, kTolerant, kTolerant};
  const Answer answer = Ask(budgets);
  ExpectAttended(answer, 0, {kFirst, kSecond, kTail}, 0.2);
  ExpectAttended(answer, 1, {kFirst}, 0.2);
  ExpectAttended(answer, 2, {{kFirst.lo + 100, kFirst.hi - 300}, {kSecond.lo, kSecond.lo + 1}},
                 0.2);
}

TEST_F(AttendLaneTest, OfARunThatIsSeenPartlyOnlyThatPartCounts) {
  units_[1] = UnitOf({kSecond.lo, kSecond.lo + 200}, 1);
  units_.pop_back();
  ExpectAttended(Ask(kTolerant), 0, {kFirst, {kSecond.lo, kSecond.lo + 200}}, 0.2);
}

TEST_F(AttendLaneTest, ACapBoundsWhatIsReadOneByOne) {
  Budget strict = kTolerant;
  strict.error = 1e-3f;
  const Answer free = Ask(strict);
  strict.k = 20;
  const Answer capped = Ask(strict);
  const uint64_t tail = uint64_t{kTail.size()} * kGroup;
  // Heads of a group share what either of them wants.
  EXPECT_LE(capped.results[0].tokens, tail + uint64_t{kGroup} * kGroup * 20);
  EXPECT_GT(free.results[0].tokens, capped.results[0].tokens);
  EXPECT_GT(capped.results[0].error_estimate, free.results[0].error_estimate);
}

// Families are searched one by one; what may be read is of all of them.
TEST_F(AttendLaneTest, ACapIsOfAllFamiliesTogether) {
  LearnedClusters other =
      *LearnClusters({&cuts_[1].segments->view(), 1}, sampled_, {.scan_if_faster = false});
  cuts_[1].index = std::move(other.indexes[0]);
  units_.pop_back();
  constexpr uint32_t kMost = 100;
  Budget strict = kTolerant;
  strict.error = 1e-3f;
  Budget capped = strict;
  capped.k = kMost;
  for (const uint32_t parts : {1, 2}) {
    search_parts_ = parts;
    const Answer both = Ask(capped);
    // Heads of a group share what either of them wants.
    EXPECT_LE(both.results[0].tokens, uint64_t{kGroup} * kGroup * kMost);
    EXPECT_GT(both.results[0].tokens, uint64_t{kGroup} * kMost * 3 / 4);
    EXPECT_GT(both.results[0].error_estimate, Ask(strict).results[0].error_estimate);
  }
}

TEST_F(AttendLaneTest, BudgetsOfTokensSpanRunsOfDifferentModelsAndTheTail) {
  LearnedClusters other =
      *LearnClusters({&cuts_[1].segments->view(), 1}, sampled_, {.scan_if_faster = false});
  cuts_[1].index = std::move(other.indexes[0]);
  const std::vector<ScanUnit> cut = units_;
  const std::vector<ScanUnit> whole = {UnitOf({kFirst.lo, kTail.hi})};
  for (const Budget& budget : {Budget{.kind = Budget::Kind::kFixedK, .k = 300},
                               Budget{.kind = Budget::Kind::kTopP, .mass = 0.5f},
                               Budget{.kind = Budget::Kind::kTopP, .k = 40, .mass = 0.5f},
                               Budget{.kind = Budget::Kind::kDipr, .beta = 2},
                               Budget{.kind = Budget::Kind::kSoftmaxLift, .k = 300}}) {
    units_ = cut;
    const Answer answer = Ask(budget);
    units_ = whole;
    const Answer want = Ask(budget);
    EXPECT_EQ(answer.results[0].tokens, want.results[0].tokens);
    if (budget.kind == Budget::Kind::kFixedK) {
      EXPECT_EQ(answer.results[0].tokens, uint64_t{kGroup} * 300);
    }
    EXPECT_NEAR(answer.results[0].error_estimate, want.results[0].error_estimate, 1e-5);
    for (size_t i = 0; i < want.o.size(); ++i) EXPECT_NEAR(answer.o[i], want.o[i], 1e-4);
    for (size_t h = 0; h < kGroup; ++h) EXPECT_NEAR(answer.lse[h], want.lse[h], 1e-4);
  }
}

TEST_F(AttendLaneTest, AMembersCapTakesNothingFromAnother) {
  Budget strict = kTolerant;
  strict.error = 1e-3f;
  for (ScanUnit& unit : units_) {
    unit.members = {0, 1};
    unit.ranges = {unit.tokens, unit.tokens};
  }
  const Answer free = Ask(std::vector<Budget>{strict, strict});
  Budget capped = strict;
  capped.k = 1;
  const Answer beside = Ask(std::vector<Budget>{strict, capped});
  EXPECT_LT(beside.results[0].error_estimate, 2 * free.results[0].error_estimate + strict.error);
  EXPECT_GT(beside.results[0].tokens, free.results[0].tokens / 2);
}

TEST_F(AttendLaneTest, ClustersArePassedByWhereBudgetsAreOfTokens) {
  const Answer all = Ask({.kind = Budget::Kind::kSoftmaxLift, .k = kTokens});
  ExpectAttended(all, 0, {kFirst, kSecond, kTail}, 1e-4);
  const Answer sampled = Ask({.kind = Budget::Kind::kSoftmaxLift, .k = 500});
  EXPECT_EQ(sampled.results[0].tokens, uint64_t{kGroup} * 500);
  EXPECT_GT(sampled.results[0].error_estimate, 0);
  for (size_t h = 0; h < kGroup; ++h) {
    EXPECT_NEAR(sampled.lse[h],
                std::log(held_.Sums(Query(0, h), {kFirst, kSecond, kTail}).back()),
                6 * sampled.results[0].error_estimate);
  }
  const Answer best = Ask({.kind = Budget::Kind::kFixedK, .k = 300});
  EXPECT_EQ(best.results[0].tokens, uint64_t{kGroup} * 300);
}

}  // namespace
}  // namespace quarry
