// An attend message in a slot: where each row's buffers lie, and moving them in and out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/retrieval_types.h"
#include "proto/shm_layout.h"
#include "proto/types.h"

namespace quarry {

// Layout of one message. Not thread-safe; kept while the request is in flight.
class AttendMessage {
 public:
  // shapes[i] is row i's context's; `version` is the channel's. InvalidArgument names the row and
  // what does not fit, FailedPrecondition what this version of the protocol cannot say.
  static absl::StatusOr<AttendMessage> Plan(std::span<const AttendRow> rows,
                                            std::span<const KvShape> shapes,
                                            uint64_t payload_bytes, uint16_t version);

  uint64_t request_bytes() const { return end_ - shm::kSlotPayload; }
  void Write(std::span<const AttendRow> rows, std::byte* slot_start) const;
  // Fills the answers; a row whose answer is not of `generation` is void (Unavailable).
  void ReadAnswers(const std::byte* slot_start, uint32_t generation,
                   std::span<AttendAnswer> answers) const;

 private:
  struct Row {
    uint64_t q, k, v, o, lse;             // offsets from the slot's start
    uint64_t q_bytes, kv_bytes, o_bytes, lse_bytes;
    // What was asked for, to be named if it is refused: an answer has no room for the reason.
    ContextId context;
    uint32_t layer;
    TokenRange range;
    std::string wrong;  // what the shape does not have
  };
  std::vector<Row> rows_;
  uint64_t end_ = 0;
};

}  // namespace quarry
