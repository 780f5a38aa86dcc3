#include "daemon/drift_watch.h"

#include <gtest/gtest.h>

namespace quarry {
namespace {

// Notes so many audits; at which of them drift was seen, 0 if never.
int DriftAfter(DriftWatch& watch, int audits, IndexFit fit, size_t head = 0) {
  for (int i = 1; i <= audits; ++i) {
    if (watch.Note(head, fit)) return i;
  }
  return 0;
}

TEST(DriftWatchTest, SixteenAuditsAreNeededAndMostMustBePoor) {
  DriftWatch watch(1);
  EXPECT_EQ(DriftAfter(watch, 8, IndexFit::kPoor), 0);
  EXPECT_EQ(DriftAfter(watch, 8, IndexFit::kGood), 0);  // half is not most
  EXPECT_EQ(DriftAfter(watch, 7, IndexFit::kGood), 0);
  EXPECT_EQ(DriftAfter(watch, 9, IndexFit::kPoor), 9);
}

TEST(DriftWatchTest, WhereLearningAgainDidNotHelpItIsTriedLessOften) {
  DriftWatch watch(1);
  EXPECT_EQ(DriftAfter(watch, 100, IndexFit::kPoor), 16);
  EXPECT_EQ(DriftAfter(watch, 100, IndexFit::kPoor), 32);
  EXPECT_EQ(DriftAfter(watch, 100, IndexFit::kPoor), 64);
  EXPECT_EQ(DriftAfter(watch, 128, IndexFit::kGood), 0);  // now it does
  EXPECT_EQ(DriftAfter(watch, 100, IndexFit::kPoor), 16);
}

TEST(DriftWatchTest, HeadsAreWatchedApartAndBeginAnewTogether) {
  DriftWatch watch(2);
  EXPECT_EQ(DriftAfter(watch, 10, IndexFit::kPoor, 1), 0);
  EXPECT_EQ(DriftAfter(watch, 100, IndexFit::kPoor, 0), 16);
  EXPECT_EQ(DriftAfter(watch, 100, IndexFit::kPoor, 1), 16);
}

}  // namespace
}  // namespace quarry
