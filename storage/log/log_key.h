// The key that the keys of an encrypted log are wrapped with, and where it comes from.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "storage/log/secret.h"

namespace quarry {

// At most one; neither: the log is not encrypted.
struct LogKeyOptions {
  std::string file;         // 32 bytes, or 64 hex digits and a newline; for its owner alone
  std::string environment;  // the name of a variable with 64 hex digits
};

struct LogKey {
  Secret secret;
  std::string origin;  // for messages
};

// Nothing: none is asked for. InvalidArgument: what is there is no key, both are asked for, or
// others than its owner may open the file; NotFound, PermissionDenied. Messages name the file or
// the variable, never what is in it.
absl::StatusOr<std::optional<LogKey>> LoadLogKey(const LogKeyOptions& options);

}  // namespace quarry
