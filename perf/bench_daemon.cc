#include "perf/bench_daemon.h"

#include <utility>

namespace quarry::perf {

testing::DaemonProcess& StartDaemon(const testing::DaemonOptions& options) {
  static std::unique_ptr<testing::DaemonProcess> running;  // exit destroys it, and so ends it
  running = nullptr;
  running = ValueOrDie(testing::DaemonProcess::Start(options), "quarryd");
  return *running;
}

std::unique_ptr<Client> ConnectTo(const testing::DaemonProcess& daemon, ClientOptions options) {
  options.socket_path = daemon.socket_path();
  return ValueOrDie(Client::Connect(options), "connect");
}

void Attend(Client* client, std::span<const AttendRow> rows, std::span<AttendAnswer> answers) {
  absl::Status status = client->Attend(rows, answers);
  for (const AttendAnswer& answer : answers) status.Update(answer.status);
  Die(status, "attend");
}

}  // namespace quarry::perf
