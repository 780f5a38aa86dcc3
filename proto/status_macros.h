// Early return on a failed absl::Status; Debian's Abseil has no such macros yet.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define QUARRY_RETURN_IF_ERROR(expression)                                     \
  do {                                                                         \
    if (absl::Status quarry_status_ = (expression); !quarry_status_.ok()) {    \
      return quarry_status_;                                                   \
    }                                                                          \
  } while (false)

#define QUARRY_MACRO_CONCAT_INNER(a, b) a##b
#define QUARRY_MACRO_CONCAT(a, b) QUARRY_MACRO_CONCAT_INNER(a, b)
#define QUARRY_ASSIGN_OR_RETURN(lhs, expression) \
  QUARRY_ASSIGN_OR_RETURN_IMPL(QUARRY_MACRO_CONCAT(quarry_or_, __LINE__), lhs, expression)
#define QUARRY_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expression) \
  auto tmp = (expression);                                 \
  if (!tmp.ok()) return tmp.status();                      \
  lhs = *std::move(tmp)
