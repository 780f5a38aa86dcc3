#include "daemon/session_reaper.h"

#include <pthread.h>

#include <utility>

namespace quarry {

SessionReaper::SessionReaper(Engine& engine) : engine_(engine), thread_([this] { Run(); }) {
  pthread_setname_np(thread_.native_handle(), "quarry-reaper");
}

SessionReaper::~SessionReaper() {
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void SessionReaper::EndSession(SessionId session) {
  const absl::MutexLock lock(&mutex_);
  sessions_.push_back(session);
}

std::shared_ptr<Channel> SessionReaper::Adopt(std::unique_ptr<Channel> channel) {
  const absl::MutexLock lock(&mutex_);
  ++channels_;
  channel_bytes_ += channel->geometry().total_bytes;
  return {channel.release(), [this](Channel* last) { Retire(last); }};
}

void SessionReaper::Retire(Channel* channel) {
  const absl::MutexLock lock(&mutex_);
  retired_.push_back(channel);
}

uint64_t SessionReaper::channels() const {
  const absl::MutexLock lock(&mutex_);
  return channels_;
}

uint64_t SessionReaper::channel_bytes() const {
  const absl::MutexLock lock(&mutex_);
  return channel_bytes_;
}

bool SessionReaper::AwaitNoChannels(absl::Time deadline) const {
  const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return channels_ == 0; };
  const absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithDeadline(absl::Condition(&none), deadline);
}

void SessionReaper::Run() {
  const auto ready = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !sessions_.empty() || !retired_.empty();
  };
  while (true) {
    std::deque<SessionId> sessions;
    std::deque<Channel*> retired;
    {
      const absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&ready));
      sessions.swap(sessions_);
      retired.swap(retired_);
      if (sessions.empty() && retired.empty()) return;
    }
    for (const SessionId session : sessions) engine_.EndSession(session);
    for (Channel* channel : retired) {
      const uint64_t bytes = channel->geometry().total_bytes;
      delete channel;
      const absl::MutexLock lock(&mutex_);
      --channels_;
      channel_bytes_ -= bytes;
    }
  }
}

}  // namespace quarry
