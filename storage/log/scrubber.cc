#include "storage/log/scrubber.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace quarry {
namespace {

// Of this thread alone. Where the system does not allow it, it is one like the others.
void TakeLowestPriority() {
  const auto thread = static_cast<id_t>(gettid());
  (void)setpriority(PRIO_PROCESS, thread, 19);
  // The last of the ordinary class: the idle one may never come to be.
  constexpr int kWhoIsThread = 1, kOrdinaryClass = 2 << 13, kLast = 7;
  (void)syscall(SYS_ioprio_set, kWhoIsThread, thread, kOrdinaryClass | kLast);
}

}  // namespace

Scrubber::Scrubber(std::function<ScrubStep()> next, const ScrubberOptions& options)
    : next_(std::move(next)), options_(options) {
  thread_ = std::thread([this] { Run(); });
  pthread_setname_np(thread_.native_handle(), "quarry-scrub");
}

Scrubber::~Scrubber() {
  {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
  }
  thread_.join();
}

bool Scrubber::Ends() {
  absl::MutexLock lock(&mutex_);
  return ending_;
}

void Scrubber::Run() {
  TakeLowestPriority();
  while (!Ends()) {
    const ScrubStep step = next_();
    // What the step took is on top: the rate is a bound.
    absl::Duration wait =
        absl::Seconds(static_cast<double>(step.bytes) / static_cast<double>(options_.bytes_per_s));
    if (step.ends_pass) wait = std::max(wait, options_.between_passes);
    if (wait <= absl::ZeroDuration()) continue;
    if (options_.wait != nullptr) {
      options_.wait(wait);
      continue;
    }
    absl::MutexLock lock(&mutex_);
    mutex_.AwaitWithTimeout(absl::Condition(&ending_), wait);
  }
}

}  // namespace quarry
