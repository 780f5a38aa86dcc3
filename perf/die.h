// The end of a benchmark that cannot go on.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quarry::perf {

// Unless OK prints `what` and the status, and exits with 1.
inline void Die(const absl::Status& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what, status.ToString().c_str());
  std::exit(1);
}

template <typename T>
T ValueOrDie(absl::StatusOr<T> value, const char* what) {
  Die(value.status(), what);
  return *std::move(value);
}

}  // namespace quarry::perf
