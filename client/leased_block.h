// A leased block: read-only bytes of the daemon, and the lease that keeps them.
#pragma once

#include <memory>

#include "client/channel.h"
#include "client/client.h"
#include "client/extents.h"

namespace quarry {

// What the blocks of one client share; it outlives the client while a block is held.
struct LeaseHome {
  explicit LeaseHome(std::unique_ptr<ClientChannel> c) : channel(std::move(c)), extents(*channel) {}
  const std::unique_ptr<ClientChannel> channel;
  ExtentMap extents;
};

// Asks for the lease that `header` and the names after it describe.
absl::StatusOr<std::unique_ptr<PendingLease>> AskForLease(const std::shared_ptr<LeaseHome>& home,
                                                          shm::LeaseHeader header,
                                                          std::string_view name_space,
                                                          std::string_view key,
                                                          ClientOptions::Verify verify);

}  // namespace quarry
