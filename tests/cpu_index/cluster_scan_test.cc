// Searches attend exactly where estimates and what they read do not take clearly less time.
#include <gtest/gtest.h>

#include <vector>

#include "tests/cpu_index/cluster_case.h"

namespace quarry {
namespace {

using testing::ClusterAnswer;
using testing::ClusterHead;
using testing::ClusterRuns;
using testing::ErrorOf;
using testing::Exactly;
using testing::Search;
using testing::Within;

constexpr uint32_t kTokens = 16384, kTogether = 4;

class ClusterScanTest : public ::testing::Test {
 protected:
  ClusterScanTest() : head_(kTokens, 64, 1), runs_(head_, ClusterRuns::Even(head_, 4)) {
    Learn(/*scan_if_faster=*/true);
  }
  void Learn(bool scan_if_faster) {
    runs_.scan_if_faster = scan_if_faster;
    runs_.Learn(head_.sampled, runs_.views.size(), kTogether);
  }
  ClusterAnswer Ask(const ClusterLimits& limits, const std::vector<TokenRange>& ranges,
                    uint32_t parts = 1) const {
    return Search(runs_, head_.Queries(0, kTogether), ranges, limits, parts);
  }
  void ExpectExact(const ClusterAnswer& found, uint32_t query,
                   const std::vector<TokenRange>& ranges) const {
    const ClusterAnswer want = Exactly(runs_, head_.Queries(0, kTogether), ranges);
    EXPECT_LT(ErrorOf(found.o[query], want.o[query]), 1e-5);
    EXPECT_NEAR(found.lse[query], want.lse[query], 1e-4);
    EXPECT_EQ(found.predicted[query], 0);
    EXPECT_EQ(found.tokens[query], ranges[query].size());
  }
  uint64_t scan_bytes() const { return head_.keys.size() + head_.values.size(); }

  ClusterHead head_;
  ClusterRuns runs_;
  const std::vector<TokenRange> ranges_ = std::vector<TokenRange>(kTogether, head_.all());
};

TEST_F(ClusterScanTest, WhereMostTokensWouldBeReadAllAreAndNoCodes) {
  for (const uint32_t parts : {1u, 3u}) {
    const ClusterAnswer found = Ask(Within(1e-4f), ranges_, parts);
    for (uint32_t i = 0; i < kTogether; ++i) ExpectExact(found, i, ranges_);
    EXPECT_EQ(found.refined.size(), kTokens);
    // A sixteenth of the codes' bytes, and maps.
    EXPECT_LT(found.bytes, scan_bytes() * 11 / 10);
  }
}

TEST_F(ClusterScanTest, WhereFewTokensAreReadEstimatesStay) {
  const ClusterAnswer found = Ask(Within(0.1f), ranges_);
  EXPECT_LT(found.bytes, scan_bytes() / 2);
  for (uint32_t i = 0; i < kTogether; ++i) EXPECT_GT(found.predicted[i], 0);
}

TEST_F(ClusterScanTest, ErrorsAreToleratedWhateverIsChosenBetween) {
  for (const float tolerance : {0.05f, 0.02f, 0.01f, 0.005f, 0.002f}) {
    const ClusterAnswer found = Ask(Within(tolerance), ranges_);
    const ClusterAnswer want = Exactly(runs_, head_.Queries(0, kTogether), ranges_);
    for (uint32_t i = 0; i < kTogether; ++i) {
      EXPECT_LT(ErrorOf(found.o[i], want.o[i]), 3 * tolerance);
    }
    // Codes may have been read for nothing.
    EXPECT_LT(found.bytes, scan_bytes() * 5 / 4);
  }
}

TEST_F(ClusterScanTest, WithoutItEstimatesStayWhateverTheyRead) {
  Learn(/*scan_if_faster=*/false);
  const ClusterAnswer found = Ask(Within(1e-3f), ranges_);
  for (uint32_t i = 0; i < kTogether; ++i) EXPECT_GT(found.predicted[i], 0);
}

TEST_F(ClusterScanTest, AFewVisibleTokensOfARunAreScanned) {
  const std::vector<TokenRange> few(kTogether,
                                    {ClusterHead::kFirst + 50, ClusterHead::kFirst + 350});
  const ClusterAnswer found = Ask(Within(0.1f), few);
  for (uint32_t i = 0; i < kTogether; ++i) ExpectExact(found, i, few);
  EXPECT_LT(found.bytes, scan_bytes() / 10);
}

TEST_F(ClusterScanTest, AQueryWithACapIsNotScannedForOthers) {
  ClusterLimits limits = Within(1e-4f);
  const std::vector<uint32_t> most = {~0u, 20, ~0u, ~0u};
  limits.most_tokens = most;
  const ClusterAnswer found = Ask(limits, ranges_);
  for (const uint32_t i : {0u, 2u, 3u}) ExpectExact(found, i, ranges_);
  EXPECT_LE(found.tokens[1], 20u);
  EXPECT_GT(found.predicted[1], 0);
}

TEST_F(ClusterScanTest, AfterLooksForNothingSearchesScanWithoutOne) {
  for (const bool foretold : {false, true}) {
    auto model = std::make_shared<ClusterModel>(*runs_.model);
    model->scans_from = foretold ? 0.02f : 0;
    runs_.Rebuild(model);
    ScanHistory history;
    ClusterLimits limits = Within(1e-4f);
    limits.history = &history;
    uint32_t looks = 0, at_codes = 0;
    for (int i = 0; i < 100; ++i) {
      const ClusterAnswer found = Ask(limits, ranges_);
      ExpectExact(found, 0, ranges_);
      looks += found.bytes > scan_bytes() ? 1 : 0;
      at_codes += found.bytes > scan_bytes() * 11 / 10 ? 1 : 0;
    }
    EXPECT_EQ(looks, foretold ? 2u : 7u);  // with 0, 0, 4, 8, 16, 32 scans behind them, and 64
    EXPECT_EQ(at_codes, looks - 1);        // all but the first
    limits.tolerance = 0.1f;               // of which nothing is known
    EXPECT_LT(Ask(limits, ranges_).bytes, scan_bytes() / 2);
  }
}

TEST_F(ClusterScanTest, SampledQueriesForetellFromWhichErrorOnScansAreFaster) {
  for (const float spread : {1.5f, 5.0f}) {
    const ClusterHead head(kTokens, 64, spread);
    ClusterRuns runs(head, ClusterRuns::Even(head, 4));
    runs.Learn(head.sampled, runs.views.size(), kTogether);
    if (spread > 2) {  // few tokens count
      EXPECT_EQ(runs.model->scans_from, 0);
    } else {
      EXPECT_GT(runs.model->scans_from, 0);
      EXPECT_LT(runs.model->scans_from, 0.1f);
    }
  }
}

TEST_F(ClusterScanTest, WithoutTheChoiceHistoryHasNoPart) {
  Learn(/*scan_if_faster=*/false);
  ScanHistory history;
  for (int i = 0; i < 3; ++i) history.Looked(1, 1.1f, /*scanned=*/true);
  ClusterLimits limits = Within(1e-3f);
  limits.history = &history;
  EXPECT_GT(Ask(limits, ranges_).predicted[0], 0);
}

TEST(ScanHistoryTest, ALookThatFindsEstimatesFasterEndsIt) {
  ScanHistory history;
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(history.ScanNext(0.1f));
    history.Looked(0.1f, 1.1f, true);
  }
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(history.ScanNext(i % 2 == 0 ? 0.1f : 0.01f));
  EXPECT_FALSE(history.ScanNext(0.1f));
  EXPECT_TRUE(history.LookDeeper());
  for (int i = 0; i < 3; ++i) {
    history.Looked(0.1f, 0.5f, false);
    EXPECT_FALSE(history.ScanNext(0.1f));
  }
  EXPECT_FALSE(history.LookDeeper());
}

TEST(ScanHistoryTest, OneLookForNothingIsEnoughWhereThatWasForetold) {
  ScanHistory history;
  EXPECT_FALSE(history.ScanNext(0.1f));
  history.Looked(0.1f, 1.1f, true, /*foretold=*/true);
  for (int i = 0; i < 64; ++i) EXPECT_TRUE(history.ScanNext(0.1f)) << i;
  for (int i = 0; i < 9; ++i) {  // one that pays goes on, whatever was foretold
    EXPECT_FALSE(history.ScanNext(0.1f));
    history.Looked(0.1f, 0.5f, false, true);
  }
}

TEST(ScanHistoryTest, WhatWasForetoldOfASmallerErrorHoldsNotForALargerOne) {
  ScanHistory history;
  for (int i = 0; i < 2; ++i) history.Looked(0.1f, 1.1f, true);
  history.Looked(0.01f, 1.1f, true, /*foretold=*/true);
  EXPECT_FALSE(history.ScanNext(0.1f));
  EXPECT_TRUE(history.ScanNext(0.01f));
}

TEST(ScanHistoryTest, LooksGoOnWhileTheyPayOnAverage) {
  ScanHistory history;
  for (int i = 0; i < 40; ++i) {  // half of them end in a scan
    EXPECT_FALSE(history.ScanNext(0.1f));
    history.Looked(0.1f, i % 2 == 0 ? 1.0f : 0.4f, i % 2 == 0);
  }
  // So do these, but the others save less than looks cost, one reading more rows than a scan takes.
  int scanned = 0;
  for (int i = 0; i < 100; ++i) {
    if (history.ScanNext(0.1f)) {
      ++scanned;
    } else {
      history.Looked(0.1f, i % 2 == 0 ? 1.4f : 0.8f, i % 2 == 0);
    }
  }
  EXPECT_GT(scanned, 70);
}

TEST(ScanHistoryTest, WhatALargerErrorTellsHoldsForASmallerOneAlone) {
  ScanHistory history;
  for (int i = 0; i < 3; ++i) history.Looked(0.01f, 1.1f, true);
  EXPECT_FALSE(history.ScanNext(0.02f));
  history.Looked(0.02f, 0.3f, false);  // tells nothing of 0.01
  EXPECT_TRUE(history.ScanNext(0.01f));
  const ScanHistory copy = history;
  EXPECT_FALSE(ScanHistory(copy).ScanNext(0.01f));
}

TEST(ScanHistoryTest, RowsThatWereNotNeededAreNotExpectedAgain) {
  ScanHistory history;
  EXPECT_FLOAT_EQ(history.NeededRows(0.9f), 0.9f);
  EXPECT_FLOAT_EQ(history.NeededRows(0), 0);
  history.Needed(5, 0);  // none were expected
  EXPECT_FLOAT_EQ(history.NeededRows(0.9f), 0.9f);
  history.Needed(10, 100);
  EXPECT_FLOAT_EQ(history.NeededRows(0.9f), 0.1f);
  history.Needed(90, 100);
  EXPECT_FLOAT_EQ(history.NeededRows(0.9f), 0.5f);
  for (int i = 0; i < 9; ++i) history.Needed(1000, 100);
  EXPECT_FLOAT_EQ(history.NeededRows(0.9f), 0.9f);
}

}  // namespace
}  // namespace quarry
