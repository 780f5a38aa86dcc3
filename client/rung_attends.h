// Attends that somebody else rings: a device writes the messages into the channel's memory and
// waits for their answers there, with no thread of the host on the path (proto/SHM.md, Devices).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "proto/retrieval_types.h"
#include "proto/rung_attend.h"

namespace quarry {

// Messages of the same rows: message i is of layer rows[r].layer + i. They are submitted in their
// order, each when the one before has been answered, and none behind one that was given up. Used by
// the thread that asked for it; until it is destroyed the client's other requests wait, and those
// of this thread are refused. A thread of the client watches: it rings the daemon's doorbell if its
// poller has parked, and when the daemon has gone, or has left a message unanswered for the
// client's deadline, the session is lost, and every wait of the device ends.
class RungAttends {
 public:
  // When whoever rings has ended: neither writes nor waits any more.
  virtual ~RungAttends() = default;

  virtual const RungLayout& layout() const = 0;
  virtual std::span<const RungMessage> messages() const = 0;
  // What belongs at the payloads' starts, one message's behind the other's: [messages][head_bytes].
  virtual std::span<const std::byte> heads() const = 0;
  // Judges what was seen of message i's answer, [RungOutcome, AttendAnswerPod[rows]]; fills all of
  // `answers`, one per row, but o and lse. Returns what is wrong with the message as a whole;
  // Unavailable if it was given up.
  virtual absl::Status Read(uint32_t i, std::span<const std::byte> outcome,
                            std::span<AttendAnswer> answers) const = 0;
};

}  // namespace quarry
