// Which of a model's weights stay in a device's memory, and which come from the host each time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace quarry {

// kAuto: all where they fit, else as many as fit.
enum class WeightMode : uint8_t { kAuto, kResident, kStreamed };

struct ResidenceRequest {
  std::span<const uint64_t> unit_bytes;  // what is used one after the other, and then again
  WeightMode mode = WeightMode::kAuto;
  uint64_t budget_bytes = 0;   // of the device
  uint64_t free_bytes = 0;     // of the budget
  uint64_t reserve_bytes = 0;  // of these, what is wanted for other things later
};

struct Residence {
  std::vector<bool> streamed;  // by unit
  // The streamed units take turns in so many slots of as many bytes: one is in use while the next
  // one comes.
  uint32_t slots = 0;
  uint64_t slot_bytes = 0;
  uint64_t resident_bytes = 0;
  uint64_t streamed_bytes = 0;  // on the host

  uint64_t device_bytes() const { return resident_bytes + slots * slot_bytes; }
};

// kResident keeps nothing free for other things, and kAuto only what it can: with everything
// streamed the weights cannot be smaller. ResourceExhausted names the bytes that are wanted and
// those that are there.
absl::StatusOr<Residence> PlanResidence(const ResidenceRequest& request);

}  // namespace quarry
