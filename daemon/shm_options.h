// Options of the shared-memory server.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace quarry {

struct ShmOptions {
  std::string socket;  // path of the handshake socket
  mode_t socket_mode = 0660;
  uint32_t max_channels = 64;
  uint64_t max_total_bytes = 4ull << 30;  // of all channels together
  uint32_t default_slots = 16;
  uint32_t max_slots = 64;
  uint64_t default_slot_bytes = 8ull << 20;
  uint64_t max_slot_bytes = 64ull << 20;
  uint32_t armed_idle_ms = 50;  // a client armed without traffic for so long counts as unarmed
  // After a request the poller stays awake for this long, so that a client that asks again at
  // once, armed or not, finds it awake (a wake-up across CPUs costs 65 µs in virtual machines).
  uint32_t linger_us = 50;
  uint32_t hello_timeout_ms = 2000;  // a connection that says nothing is closed
  uint32_t bulk_threads = 2;         // for calls, appends and puts
  uint32_t bulk_queue = 256;         // waiting requests of all clients
  uint32_t bulk_queue_per_client = 64;
};

}  // namespace quarry
