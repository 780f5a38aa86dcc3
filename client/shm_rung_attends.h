// What the host does for attends that a device rings: it plans the messages, keeps other threads'
// requests back, and sees to it that no wait is for ever.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/attend_message.h"
#include "client/channel.h"
#include "client/rung_attends.h"

namespace quarry {

// A thread that watches over one set of messages at a time, and sleeps between them.
class RingWatchdog {
 public:
  explicit RingWatchdog(ClientChannel& channel);
  ~RingWatchdog();
  RingWatchdog(const RingWatchdog&) = delete;
  RingWatchdog& operator=(const RingWatchdog&) = delete;

  // Both from one thread at a time. The messages stay as they are until Stop returns.
  void Watch(std::span<const RungMessage> messages);
  void Stop();
  // The first message of these that was given up, if one was: it and those behind it do not count,
  // whatever their answers say.
  std::optional<size_t> GivenUp() const;

 private:
  void Run();
  void Look() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  ClientChannel& channel_;
  mutable absl::Mutex mutex_;
  std::span<const RungMessage> messages_ ABSL_GUARDED_BY(mutex_);  // none: nothing to watch
  size_t rung_ ABSL_GUARDED_BY(mutex_) = 0;  // messages submitted, as far as was seen
  absl::Time since_ ABSL_GUARDED_BY(mutex_);
  std::optional<size_t> given_up_ ABSL_GUARDED_BY(mutex_);
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

class ShmRungAttends final : public RungAttends {
 public:
  // Every row asks for tokens and stores one, with fp32 queries and no buffers; all are of contexts
  // of this shape and of as many heads. At least one message. Errors are those of Attend, before
  // anything is sent; FailedPrecondition if this thread has others.
  static absl::StatusOr<std::unique_ptr<RungAttends>> Begin(ClientChannel& channel,
                                                            RingWatchdog& watchdog,
                                                            std::span<const AttendRow> rows,
                                                            const KvShape& shape,
                                                            uint32_t messages);
  ~ShmRungAttends() override;

  const RungLayout& layout() const override { return layout_; }
  std::span<const RungMessage> messages() const override { return messages_; }
  std::span<const std::byte> heads() const override { return heads_; }
  absl::Status Read(uint32_t i, std::span<const std::byte> outcome,
                    std::span<AttendAnswer> answers) const override;

 private:
  ShmRungAttends(ClientChannel& channel, RingWatchdog& watchdog, AttendMessage message,
                 const ClientChannel::Loan& loan)
      : channel_(channel), watchdog_(watchdog), message_(std::move(message)), loan_(loan) {}
  void Fill(std::span<const AttendRow> rows, const KvShape& shape, uint32_t messages);

  ClientChannel& channel_;
  RingWatchdog& watchdog_;
  const AttendMessage message_;
  ClientChannel::Loan loan_;
  RungLayout layout_;
  std::vector<RungMessage> messages_;
  std::vector<std::byte> heads_;
};

}  // namespace quarry
