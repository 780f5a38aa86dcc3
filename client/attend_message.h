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
  // Whose q, k and v are sent: the rows', or what somebody else writes into the slot; then the rows
  // have none.
  enum class Buffers { kRows, kElsewhere };
  // Of a row: offsets from the slot's start, and sizes.
  struct Place {
    uint64_t q, k, v, o, lse;
    uint64_t q_bytes, kv_bytes, o_bytes, lse_bytes;
  };

  // shapes[i] is row i's context's; `version` is the channel's. InvalidArgument names the row and
  // what does not fit, FailedPrecondition what this version of the protocol cannot say.
  static absl::StatusOr<AttendMessage> Plan(std::span<const AttendRow> rows,
                                            std::span<const KvShape> shapes, uint64_t payload_bytes,
                                            uint16_t version, Buffers buffers = Buffers::kRows);

  uint64_t request_bytes() const { return end_ - shm::kSlotPayload; }
  uint64_t head_bytes() const;
  const Place& place(size_t row) const { return rows_[row].place; }
  // The header and the rows, without their buffers.
  void WriteHead(std::span<const AttendRow> rows, std::byte* payload) const;
  void Write(std::span<const AttendRow> rows, std::byte* slot_start) const;
  // Fills the answers; a row whose answer is not of `generation` is void (Unavailable).
  void ReadAnswers(const std::byte* slot_start, uint32_t generation,
                   std::span<AttendAnswer> answers) const;
  // The same from answer pods alone, to rows that are `layers` layers farther than the planned
  // ones: o and lse are left as they are.
  void ReadPods(const std::byte* pods, uint32_t generation, uint32_t layers,
                std::span<AttendAnswer> answers) const;

 private:
  struct Row {
    Place place;
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
