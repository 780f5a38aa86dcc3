// Ends sessions and unmaps channels away from the poller, since both may take long.
#pragma once

#include <cstdint>
#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "daemon/channel.h"
#include "daemon/engine.h"

namespace quarry {

// Thread-safe; one thread of its own. Its queue needs no limit of its own: it holds at most one
// session and one channel per client, and clients are limited until their channel is unmapped.
class SessionReaper {
 public:
  explicit SessionReaper(Engine& engine);
  // Finishes what is queued, then joins. No adopted channel may be alive.
  ~SessionReaper();

  void EndSession(SessionId session);
  // The channel is unmapped by the reaper's thread when the last owner lets go.
  std::shared_ptr<Channel> Adopt(std::unique_ptr<Channel> channel);

  // Adopted channels that are not unmapped yet.
  uint64_t channels() const;
  uint64_t channel_bytes() const;
  // Blocks until there is none; false at the deadline.
  bool AwaitNoChannels(absl::Time deadline) const;

 private:
  void Run();
  void Retire(Channel* channel);

  Engine& engine_;
  mutable absl::Mutex mutex_;
  std::deque<SessionId> sessions_ ABSL_GUARDED_BY(mutex_);
  std::deque<Channel*> retired_ ABSL_GUARDED_BY(mutex_);
  uint64_t channels_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t channel_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace quarry
