// How a program of ours is told which daemon to ask: --socket, else QUARRY_SOCKET, else the
// default.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"

namespace quarry {

inline constexpr char kSocketVariable[] = "QUARRY_SOCKET";

// Client::Connect for a program with the option --socket: says how to name another socket where no
// daemon answers.
inline absl::StatusOr<std::unique_ptr<Client>> ConnectProgram(const ClientOptions& options) {
  absl::StatusOr<std::unique_ptr<Client>> client = Client::Connect(options);
  if (client.ok() || !absl::IsUnavailable(client.status())) return client;
  return absl::UnavailableError(absl::StrCat(client.status().message(), " (--socket or ",
                                             kSocketVariable, " names another socket)"));
}

}  // namespace quarry
