// Submitting a request: the one place that fills an entry of a channel's ring (proto/SHM.md).
#pragma once

#include <atomic>
#include <cstdint>

#include "proto/shm_layout.h"

namespace quarry::shm {

// The request's slot is whole. `sequence` counts the channel's requests from 1.
inline void SubmitTo(SubmitEntry* entry, uint64_t sequence, uint32_t slot, Opcode opcode,
                     uint64_t request_bytes, uint32_t generation) {
  entry->slot = slot;
  entry->opcode = static_cast<uint16_t>(opcode);
  entry->flags = 0;
  entry->request_bytes = request_bytes;
  entry->generation = generation;
  entry->reserved = 0;
  // Last: the entry and the slot's payload are whole when the daemon sees it.
  entry->sequence.store(sequence, std::memory_order_release);
}

}  // namespace quarry::shm
