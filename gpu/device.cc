// What a device without an implementation of sparse prefill answers.
#include "gpu/device.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace quarry {

absl::StatusOr<std::unique_ptr<SparsePlan>> Device::PlanSparse(std::span<const HeadPattern>,
                                                               TokenRange, const DeviceAttention&) {
  return absl::UnimplementedError(absl::StrCat("no sparse prefill on ", std::string(name())));
}

absl::Status Device::AttendSparse(const SparsePlan&, const DeviceAttention&) {
  return absl::UnimplementedError(absl::StrCat("no sparse prefill on ", std::string(name())));
}

}  // namespace quarry
