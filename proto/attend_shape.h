// Checks an attend row against its context's shape, so that its buffers have known sizes.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "proto/retrieval_types.h"
#include "proto/types.h"

namespace quarry {

struct AttendRowBytes {
  uint64_t q = 0;    // [heads][head_dim] of q_dtype
  uint64_t kv = 0;   // of k, and of v; 0 without a new token
  uint64_t o = 0;    // [heads][head_dim] fp32
  uint64_t lse = 0;  // [heads] fp32
};

// InvalidArgument names the field and its number: a k of 0, mass outside (0, 1], error outside
// (0, 1), beta below 0 or not finite, an unknown kind.
absl::Status CheckBudget(const Budget& budget);
// InvalidArgument names the field and the numbers: heads outside the model or not whole groups,
// a layer outside it, a range that ends before it starts, an unknown dtype; and what CheckBudget refuses.
absl::Status CheckRow(const AttendRow& row, const KvShape& shape);
// InvalidArgument for a row over tokens whose q is null.
absl::Status CheckHasQueries(const AttendRow& row);
// Of a row that CheckRow accepts; else its error.
absl::StatusOr<AttendRowBytes> BytesOfRow(const AttendRow& row, const KvShape& shape);

}  // namespace quarry
