#include "gpu/weights/residence.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

// `count` of the units streamed, evenly among the others, so that the work on those that stay hides
// the copies of those that come.
Residence Streaming(std::span<const uint64_t> unit_bytes, size_t count) {
  Residence out;
  const size_t units = unit_bytes.size();
  for (size_t u = 0; u < units; ++u) {
    const bool streamed = (u + 1) * count / units > u * count / units;
    out.streamed.push_back(streamed);
    (streamed ? out.streamed_bytes : out.resident_bytes) += unit_bytes[u];
    if (streamed) out.slot_bytes = std::max(out.slot_bytes, unit_bytes[u]);
  }
  out.slots = static_cast<uint32_t>(std::min<size_t>(2, count));
  return out;
}

}  // namespace

absl::StatusOr<Residence> PlanResidence(const ResidenceRequest& r) {
  const size_t units = r.unit_bytes.size();
  const auto fits = [&](const Residence& plan, uint64_t reserve) {
    return plan.device_bytes() <= r.free_bytes && reserve <= r.free_bytes - plan.device_bytes();
  };
  const Residence resident = Streaming(r.unit_bytes, 0), streamed = Streaming(r.unit_bytes, units);
  if (r.mode != WeightMode::kStreamed) {
    if (fits(resident, r.mode == WeightMode::kAuto ? r.reserve_bytes : 0)) return resident;
    if (r.mode == WeightMode::kResident) {
      return absl::ResourceExhaustedError(
          absl::StrCat("resident weights take ", resident.resident_bytes, " bytes, ", r.free_bytes,
                       " are free of a budget of ", r.budget_bytes));
    }
    // An even number of them: then the first one's slot is not the last one's, and it can come
    // while that is in use. Two alone would take as much in their slots as if they stayed.
    for (size_t count = 4; count < units; count += 2) {
      const Residence plan = Streaming(r.unit_bytes, count);
      if (fits(plan, r.reserve_bytes)) return plan;
    }
  }
  if (fits(streamed, 0)) return streamed;
  return absl::ResourceExhaustedError(absl::StrCat(
      "streamed weights take ", streamed.device_bytes(), " bytes at a time",
      r.mode == WeightMode::kAuto ? absl::StrCat(" (", resident.resident_bytes, " if resident)")
                                  : "",
      ", ", r.free_bytes, " are free of a budget of ", r.budget_bytes));
}

}  // namespace quarry
