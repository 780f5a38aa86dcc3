#include "daemon/low_priority.h"

#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "proto/check.h"

namespace quarry {
namespace {

constexpr int kNicer = 10;

// Of a thread and its own handler only.
thread_local volatile int64_t offered_ns = 0;  // processor time of the thread at its last offer
thread_local volatile uint64_t offers = 0;

std::atomic<int> hurries{0};
static_assert(std::atomic<int>::is_always_lock_free);  // a handler reads it

int64_t ThreadNs() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// A signal that came while the thread had no processor is taken when it has one again: then it has
// not worked yet, and goes on.
void Offer(int) {
  const int saved = errno;
  const int64_t now = ThreadNs();
  if (hurries.load(std::memory_order_relaxed) == 0 &&
      now - offered_ns >= OfferingProcessor::kStretchUs * 1000 / 2) {
    sched_yield();
    offered_ns = now;
    offers = offers + 1;
  }
  errno = saved;
}

// The signal, with its handler.
int OfferSignal() {
  static const int signal = [] {
    const int number = SIGRTMAX - 1;
    struct sigaction action {};
    action.sa_handler = Offer;
    action.sa_flags = SA_RESTART;
    QUARRY_CHECK(sigaction(number, &action, nullptr) == 0);
    return number;
  }();
  return signal;
}

pid_t ThreadId() { return static_cast<pid_t>(syscall(SYS_gettid)); }

}  // namespace

void RunBehindDecoding() {
  const auto thread = static_cast<id_t>(ThreadId());
  setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + kNicer);
}

Hurry::Hurry() { hurries.fetch_add(1, std::memory_order_relaxed); }

Hurry::~Hurry() { hurries.fetch_sub(1, std::memory_order_relaxed); }

OfferingProcessor::OfferingProcessor() {
  offered_ns = ThreadNs();
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = OfferSignal();
  event._sigev_un._tid = ThreadId();  // glibc 2.36 has no name for it
  has_timer_ = timer_create(CLOCK_MONOTONIC, &event, &timer_) == 0;
  if (!has_timer_) return;
  const timespec stretch{0, kStretchUs * 1000};
  const itimerspec every{stretch, stretch};
  timer_settime(timer_, 0, &every, nullptr);
}

OfferingProcessor::~OfferingProcessor() {
  if (has_timer_) timer_delete(timer_);
}

uint64_t OfferingProcessor::Offers() { return offers; }

}  // namespace quarry
