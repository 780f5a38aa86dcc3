// Attend messages in a slot: from untrusted bytes to engine rows, and back.
#pragma once

#include <memory>

#include "daemon/channel.h"
#include "daemon/engine.h"
#include "daemon/metrics.h"

namespace quarry {

// Poller thread. Parses the message, gives its valid rows to the engine, and answers when they are
// done (here, when the engine answers small batches at once, else on an executor). A row that is
// wrong gets its own status; a message that is wrong as a whole an error for all.
void ServeAttend(Engine& engine, TransportCounters& counters, std::shared_ptr<Channel> channel,
                 const Submission& request);

}  // namespace quarry
