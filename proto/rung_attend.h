// Attend messages that a device writes, submits and waits for itself, one after the other in one
// slot. Addresses are of the process that maps the channel; a device has to map them too. What the
// words mean: proto/SHM.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proto/shm_layout.h"

namespace quarry {

// Where a message's buffers lie in its slot, in bytes from the slot's start: those of row 0; row
// r's lie r * row_stride behind. Every row has q fp32 [heads][head_dim], k and v
// [kv_heads][head_dim] of the context's dtype, o fp32 as q and lse fp32 [heads].
struct RungLayout {
  uint32_t rows = 0, heads = 0, head_dim = 0;
  uint64_t kv_bytes = 0;  // of a row's k, and of its v
  uint64_t q = 0, k = 0, v = 0, o = 0, lse = 0, row_stride = 0;
  // What stands at the payload's start: AttendHeader, AttendRowPod[rows].
  uint64_t head_bytes = 0;
  bool operator==(const RungLayout&) const = default;
};

// One message. The slot is free for it once the message before it has been answered.
struct RungMessage {
  std::byte* slot = nullptr;
  // What is submitted: the entry's fields, `sequence` last and with release order.
  shm::SubmitEntry* entry = nullptr;
  uint64_t sequence = 0, request_bytes = 0;
  uint32_t slot_index = 0, generation = 0;
  // Answered, or given up, once the slot's `done` has this bit. It is not set before.
  uint32_t answered_bit = 0;
};

// What a device has seen of a message's answer; AttendAnswerPod[rows] follow it. Rows whose answer
// counts: `done` and the row's generation are the message's, both statuses 0.
struct RungOutcome {
  uint32_t done = 0;
  uint32_t status = 0;  // of the message
};
static_assert(sizeof(RungOutcome) == 8);

inline size_t RungOutcomeBytes(uint32_t rows) {
  return sizeof(RungOutcome) + rows * sizeof(shm::AttendAnswerPod);
}

}  // namespace quarry
