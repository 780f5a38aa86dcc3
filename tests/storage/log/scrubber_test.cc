#include "storage/log/scrubber.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "absl/synchronization/notification.h"

namespace quarry {
namespace {

// Waits are so long that the rate is no more than what was asked for, and none is without reason.
TEST(ScrubberTest, ReadsAtABoundedRate) {
  const std::vector<ScrubStep> steps = {
      {1000, false}, {0, false}, {500, false}, {0, true}, {8000, true}};
  std::vector<absl::Duration> waits;
  size_t at = 0;
  absl::Notification done;
  {
    Scrubber scrubber(
        [&] {
          if (at < steps.size()) return steps[at++];
          if (!done.HasBeenNotified()) done.Notify();
          return ScrubStep();
        },
        {.bytes_per_s = 1000, .between_passes = absl::Seconds(3), .wait = [&](absl::Duration wait) {
           waits.push_back(wait);
         }});
    done.WaitForNotification();
  }
  EXPECT_EQ(waits, (std::vector{absl::Seconds(1), absl::Milliseconds(500), absl::Seconds(3),
                                absl::Seconds(8)}));
}

TEST(ScrubberTest, ItsEndDoesNotWait) {
  absl::Notification waits;
  int nice = 0;
  auto scrubber = std::make_unique<Scrubber>(
      [&] {
        nice = getpriority(PRIO_PROCESS, static_cast<id_t>(gettid()));
        waits.Notify();
        return ScrubStep{uint64_t{1} << 40, false};
      },
      ScrubberOptions{.bytes_per_s = 1});
  waits.WaitForNotification();
  scrubber = nullptr;  // or the test takes 35,000 years
  EXPECT_EQ(nice, 19);
}

}  // namespace
}  // namespace quarry
