// The commands of `quarry`. Each connects, prints to standard output and returns what went wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/default_socket.h"

namespace quarry::cli {

struct Arguments {
  std::string socket = DefaultSocket();
  bool json = false;
  uint32_t limit = 1000;
  std::string name, name_space, image;
  uint64_t context = 0, ttl_ms = 0, timeout_ms = 60'000;
  std::vector<std::string> blocks;
  bool all = false, once = false;
  uint32_t interval_ms = 1000;
};

absl::Status ShowStatus(const Arguments&);
absl::Status ShowContexts(const Arguments&);
absl::Status ShowBlocks(const Arguments&);
absl::Status Pin(const Arguments&);
absl::Status Unpin(const Arguments&);
absl::Status Purge(const Arguments&);
// Waits until the tenant's blocks, or those named, are on the disk.
absl::Status Flush(const Arguments&);
absl::Status Drain(const Arguments&);
// What audits of live answers found, for models of the tenant: a table with totals, and with
// a.image a file of heat maps.
absl::Status Audit(const Arguments&);
// Leases every published block of every open context of the tenant and compares digests, each block
// once. Blocks that no open context uses cannot be leased; how many they are is said. DataLoss if
// any digest differs.
absl::Status Verify(const Arguments&);
absl::Status Top(const Arguments&);

}  // namespace quarry::cli
