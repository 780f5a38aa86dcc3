// A daemon of a benchmark's own, and clients of it. What fails ends the program with a message.
#pragma once

#include <memory>
#include <span>

#include "client/client.h"
#include "perf/die.h"
#include "tests/support/daemon_process.h"

namespace quarry::perf {

// Runs until the next one is started or the program ends, also by exit.
testing::DaemonProcess& StartDaemon(const testing::DaemonOptions& options);

// `options` but for the socket, which is the daemon's.
std::unique_ptr<Client> ConnectTo(const testing::DaemonProcess& daemon, ClientOptions options);

// Answers in `answers`, each of which is to be OK.
void Attend(Client* client, std::span<const AttendRow> rows, std::span<AttendAnswer> answers);

}  // namespace quarry::perf
