// Token ids as arguments of the programs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace quarry {

// "1,5,9", also with spaces, line ends and brackets, or "@FILE" with such text. InvalidArgument
// names a word that is no number of 32 bits; else the file and why it cannot be read.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& argument);

}  // namespace quarry
