// Tells ThreadSanitizer what Abseil's mutexes order. Debian's Abseil is not built with TSan, which
// therefore does not see that an Unlock happens before the next Lock and reports every guarded
// member. These definitions stand before the library's (which are called through), so they are
// linked into programs of TSan builds only.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdio>
#include <cstdlib>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

namespace {

template <typename Function>
Function* Library(const char* symbol) {
  void* const found = dlsym(RTLD_NEXT, symbol);
  if (found == nullptr) {
    std::fprintf(stderr, "absl_sync.cc: no symbol %s in the libraries\n", symbol);
    std::abort();
  }
  return reinterpret_cast<Function*>(found);
}

void Acquired(const void* object) { __tsan_acquire(const_cast<void*>(object)); }
void Releases(const void* object) { __tsan_release(const_cast<void*>(object)); }

// Abseil evaluates a condition under the mutex, but on any thread: whoever unlocks next, also from
// within the library. So what stands here is read without TSan's knowledge, and what the condition
// itself reads is ordered by the mutex.
struct OrderedCondition {
  absl::Mutex* mutex;
  const absl::Condition* condition;

  __attribute__((no_sanitize("thread"))) static bool Eval(void* argument) {
    auto* const self = static_cast<OrderedCondition*>(argument);
    Acquired(self->mutex);
    const bool met = self->condition->Eval();
    Releases(self->mutex);
    return met;
  }
};

// Its graph of locks is guarded by a spin lock that TSan does not see either.
[[maybe_unused]] const bool kNoDeadlockDetection = [] {
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  return true;
}();

}  // namespace

#define QUARRY_ABSL(name) "_ZN4absl7debian3" name

namespace absl {
inline namespace debian3 {

void Mutex::Lock() {
  static auto* const real = Library<void(Mutex*)>(QUARRY_ABSL("5Mutex4LockEv"));
  real(this);
  Acquired(this);
}
void Mutex::Unlock() {
  static auto* const real = Library<void(Mutex*)>(QUARRY_ABSL("5Mutex6UnlockEv"));
  Releases(this);
  real(this);
}
void Mutex::ReaderLock() {
  static auto* const real = Library<void(Mutex*)>(QUARRY_ABSL("5Mutex10ReaderLockEv"));
  real(this);
  Acquired(this);
}
void Mutex::ReaderUnlock() {
  static auto* const real = Library<void(Mutex*)>(QUARRY_ABSL("5Mutex12ReaderUnlockEv"));
  Releases(this);
  real(this);
}
bool Mutex::TryLock() {
  static auto* const real = Library<bool(Mutex*)>(QUARRY_ABSL("5Mutex7TryLockEv"));
  const bool locked = real(this);
  if (locked) Acquired(this);
  return locked;
}
void Mutex::Await(const Condition& condition) {
  static auto* const real =
      Library<void(Mutex*, const Condition&)>(QUARRY_ABSL("5Mutex5AwaitERKNS0_9ConditionE"));
  OrderedCondition ordered{this, &condition};
  Releases(this);
  real(this, Condition(&OrderedCondition::Eval, static_cast<void*>(&ordered)));
  Acquired(this);
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const real = Library<bool(Mutex*, const Condition&, Duration)>(
      QUARRY_ABSL("5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
  OrderedCondition ordered{this, &condition};
  Releases(this);
  const bool met =
      real(this, Condition(&OrderedCondition::Eval, static_cast<void*>(&ordered)), timeout);
  Acquired(this);
  return met;
}
bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static auto* const real = Library<bool(Mutex*, const Condition&, Time)>(
      QUARRY_ABSL("5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
  OrderedCondition ordered{this, &condition};
  Releases(this);
  const bool met =
      real(this, Condition(&OrderedCondition::Eval, static_cast<void*>(&ordered)), deadline);
  Acquired(this);
  return met;
}
void Mutex::LockWhen(const Condition& condition) {
  static auto* const real =
      Library<void(Mutex*, const Condition&)>(QUARRY_ABSL("5Mutex8LockWhenERKNS0_9ConditionE"));
  OrderedCondition ordered{this, &condition};
  Releases(this);  // what the condition reads
  real(this, Condition(&OrderedCondition::Eval, static_cast<void*>(&ordered)));
  Acquired(this);
}

void CondVar::Wait(Mutex* mutex) {
  static auto* const real =
      Library<void(CondVar*, Mutex*)>(QUARRY_ABSL("7CondVar4WaitEPNS0_5MutexE"));
  Releases(mutex);
  real(this, mutex);
  Acquired(mutex);
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static auto* const real = Library<bool(CondVar*, Mutex*, Duration)>(
      QUARRY_ABSL("7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE"));
  Releases(mutex);
  const bool timed_out = real(this, mutex, timeout);
  Acquired(mutex);
  return timed_out;
}
bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static auto* const real = Library<bool(CondVar*, Mutex*, Time)>(
      QUARRY_ABSL("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE"));
  Releases(mutex);
  const bool timed_out = real(this, mutex, deadline);
  Acquired(mutex);
  return timed_out;
}

void Notification::Notify() {
  static auto* const real = Library<void(Notification*)>(QUARRY_ABSL("12Notification6NotifyEv"));
  Releases(this);
  real(this);
}
void Notification::WaitForNotification() const {
  static auto* const real =
      Library<void(const Notification*)>("_ZNK4absl7debian312Notification19WaitForNotificationEv");
  real(this);
  Acquired(this);
}
bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  static auto* const real = Library<bool(const Notification*, Duration)>(
      "_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
  const bool notified = real(this, timeout);
  if (notified) Acquired(this);
  return notified;
}

}  // namespace debian3
}  // namespace absl
