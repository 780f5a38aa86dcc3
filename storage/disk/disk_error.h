// The errno of a system call on a disk, as a status.
#pragma once

#include <string_view>

#include "absl/status/status.h"

namespace quarry {

// While a disk is being opened the caller or the machine may be wrong in many ways, and the code
// says which. An open disk says what disk.h allows: ResourceExhausted or Unavailable.
enum class DiskCall { kOpening, kTransfer };

absl::Status DiskError(DiskCall call, int error, std::string_view what);

}  // namespace quarry
