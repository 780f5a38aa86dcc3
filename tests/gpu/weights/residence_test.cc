#include "gpu/weights/residence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace quarry {
namespace {

size_t Streamed(const Residence& plan) {
  return static_cast<size_t>(std::count(plan.streamed.begin(), plan.streamed.end(), true));
}

TEST(ResidenceTest, AllStayWhereTheyFitBesideTheReserve) {
  const std::vector<uint64_t> units(10, 100);
  auto plan = PlanResidence({units, WeightMode::kAuto, 2000, 1500, 500});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(Streamed(*plan), 0u);
  EXPECT_EQ(plan->device_bytes(), 1000u);
  EXPECT_EQ(plan->slots, 0u);
}

TEST(ResidenceTest, AsManyStayAsFitAndTheRestIsSpreadEvenly) {
  const std::vector<uint64_t> units(32, 100);
  for (uint64_t free = 1000; free < 3700; free += 50) {
    auto plan = PlanResidence({units, WeightMode::kAuto, 4000, free, 500});
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_LE(plan->device_bytes() + 500, free);
    EXPECT_EQ(plan->resident_bytes + plan->streamed_bytes, 3200u);
    if (Streamed(*plan) == 0) continue;
    EXPECT_EQ(Streamed(*plan) % 2, 0u);  // so that the first one can come during the last
    EXPECT_GT(plan->device_bytes() + 500 + 2 * 100, free);
    // Between two streamed units lie about as many others as between any two.
    const size_t share = 32 / Streamed(*plan);
    size_t last = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      if (!plan->streamed[u]) continue;
      EXPECT_LE(u - last, share + 1);
      last = u;
    }
  }
}

TEST(ResidenceTest, WithoutRoomForTheReserveEverythingIsStreamed) {
  const std::vector<uint64_t> units = {100, 120, 100, 110, 30};
  auto plan = PlanResidence({units, WeightMode::kAuto, 300, 240, 1000});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(Streamed(*plan), 5u);
  EXPECT_EQ(plan->slot_bytes, 120u);
  EXPECT_EQ(plan->device_bytes(), 240u);
}

TEST(ResidenceTest, StreamedIsStreamedWhateverFits) {
  const std::vector<uint64_t> units(3, 100);
  auto plan = PlanResidence({units, WeightMode::kStreamed, 10000, 10000, 0});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(Streamed(*plan), 3u);
  const std::vector<uint64_t> one(1, 100);
  plan = PlanResidence({one, WeightMode::kStreamed, 100, 100, 0});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->slots, 1u);
}

TEST(ResidenceTest, RefusalsNameTheBytes) {
  const std::vector<uint64_t> units(10, 100);
  const auto expect = [&](WeightMode mode, uint64_t free, std::vector<std::string> words) {
    const absl::Status status = PlanResidence({units, mode, 12345, free, 0}).status();
    EXPECT_TRUE(absl::IsResourceExhausted(status));
    for (const std::string& word : words) {
      EXPECT_NE(std::string(status.message()).find(word), std::string::npos)
          << status << " lacks " << word;
    }
  };
  expect(WeightMode::kResident, 999, {"1000", "999", "12345"});
  expect(WeightMode::kStreamed, 199, {"200", "199", "12345"});
  expect(WeightMode::kAuto, 199, {"200", "1000", "199", "12345"});
}

}  // namespace
}  // namespace quarry
