#include "daemon/low_priority.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <ctime>
#include <thread>

namespace quarry {
namespace {

int Nice() { return getpriority(PRIO_PROCESS, 0); }

double ThreadSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void Work(double seconds) {
  const double end = ThreadSeconds() + seconds;
  while (ThreadSeconds() < end) {
  }
}

TEST(LowPriorityTest, AThreadIsTenNicerThanTheProcessAndNobodyElseIs) {
  const int before = Nice();
  int behind = 0;
  std::thread([&] {
    RunBehindDecoding();
    behind = Nice();
  }).join();
  EXPECT_EQ(behind, std::min(before + 10, 19));
  EXPECT_EQ(Nice(), before);
}

TEST(LowPriorityTest, AThreadOffersItsProcessorAsLongAsItSaysSo) {
  EXPECT_EQ(OfferingProcessor::Offers(), 0u);
  {
    const OfferingProcessor offering;
    Work(0.05);
  }
  const uint64_t offers = OfferingProcessor::Offers();
  EXPECT_GE(offers, 2u);
  EXPECT_LE(offers, 0.05 * 1e6 / (OfferingProcessor::kStretchUs / 2.0) + 1);
  Work(0.01);
  EXPECT_LE(OfferingProcessor::Offers(), offers + 1);  // one signal may have been on its way
}

TEST(LowPriorityTest, NoneIsOfferedToWhoeverIsInAHurry) {
  const OfferingProcessor offering;
  const Hurry hurry;
  Work(0.01);  // a signal may be in its handler
  const uint64_t before = OfferingProcessor::Offers();
  Work(0.05);
  EXPECT_EQ(OfferingProcessor::Offers(), before);
  { const Hurry another; }
  Work(0.01);
  EXPECT_EQ(OfferingProcessor::Offers(), before);
}

TEST(LowPriorityTest, ThreadsOfferEachForThemselves) {
  const OfferingProcessor offering;
  uint64_t others = 0;
  std::thread([&] {
    Work(0.01);
    others = OfferingProcessor::Offers();
  }).join();
  EXPECT_EQ(others, 0u);
}

}  // namespace
}  // namespace quarry
