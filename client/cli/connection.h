// How the command line reaches the daemon.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "client/cli/commands.h"
#include "client/client.h"

namespace quarry::cli {

inline absl::StatusOr<std::unique_ptr<Client>> Connect(const Arguments& a) {
  ClientOptions options;
  options.socket_path = a.socket;
  options.name = "quarry-cli";
  return Client::Connect(options);
}

}  // namespace quarry::cli
