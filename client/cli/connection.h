// How the command line reaches the daemon.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "client/cli/commands.h"
#include "client/program_socket.h"

namespace quarry::cli {

inline absl::StatusOr<std::unique_ptr<Client>> Connect(const Arguments& a) {
  ClientOptions options;
  options.socket_path = a.socket;
  options.name = "quarry-cli";
  return ConnectProgram(options);
}

}  // namespace quarry::cli
