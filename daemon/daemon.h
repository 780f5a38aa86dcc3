// The daemon as one object: what main.cc composes.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/config.h"

namespace quarry {

class Daemon {
 public:
  // Starts everything; what was started is stopped again on error. The configuration is valid.
  // on_drain: what an administrator's Drain call does; returns at once.
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const Config& config,
                                                       std::function<void()> on_drain);
  // Stops serving; cancels what is still open. Waits for the engine's work in flight.
  virtual ~Daemon() = default;

  // Refuses new work and waits for what is in flight; false at the deadline.
  virtual bool Drain(absl::Time deadline) = 0;
};

}  // namespace quarry
