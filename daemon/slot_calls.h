// The requests of a slot other than attend: calls, appends, puts, leases.
#pragma once

#include <memory>

#include "daemon/bulk_pool.h"
#include "daemon/call_dispatch.h"
#include "daemon/channel.h"

namespace quarry {

// What serving a slot needs; owned by the server.
struct SlotServices {
  const ServiceParts& parts;
  TransportCounters& counters;
  BulkPool& bulk;
  uint32_t bulk_per_client = 64;
};

// Poller thread; never blocks. Answers nop, lease and release at once, starts attends, and hands
// everything else to the bulk pool (full: ResourceExhausted is answered). Unknown opcodes are
// answered InvalidArgument.
void ServeRequest(const SlotServices& services, const std::shared_ptr<Channel>& channel,
                  const Submission& request);

}  // namespace quarry
