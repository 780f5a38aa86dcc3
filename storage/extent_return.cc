#include "storage/extent_return.h"

#include <pthread.h>

#include <utility>

namespace quarry {

ExtentReturn::ExtentReturn(std::function<void(EmptyExtents)> unmap)
    : unmap_(std::move(unmap)), thread_([this] { Loop(); }) {
  pthread_setname_np(thread_.native_handle(), "quarry-unmap");
}

ExtentReturn::~ExtentReturn() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void ExtentReturn::Add(EmptyExtents emptied) {
  absl::MutexLock lock(&mutex_);
  waiting_.push_back(std::move(emptied));
}

void ExtentReturn::Loop() {
  for (;;) {
    std::vector<EmptyExtents> emptied;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(this, &ExtentReturn::HasWork));
      if (waiting_.empty()) return;
      emptied.swap(waiting_);
    }
    for (EmptyExtents& extents : emptied) unmap_(std::move(extents));
  }
}

}  // namespace quarry
