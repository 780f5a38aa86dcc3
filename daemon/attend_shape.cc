#include "daemon/attend_shape.h"

#include "absl/strings/str_cat.h"

namespace quarry {

absl::StatusOr<AttendRowBytes> BytesOfRow(const AttendRow& row, const KvShape& shape) {
  if (row.layer >= shape.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", row.layer, " of a model with ", shape.layers));
  }
  if (row.range.lo > row.range.hi) {
    return absl::InvalidArgumentError(
        absl::StrCat("range [", row.range.lo, ", ", row.range.hi, ") ends before it starts"));
  }
  if (row.heads == 0 || row.first_head > shape.heads || row.heads > shape.heads - row.first_head) {
    return absl::InvalidArgumentError(absl::StrCat("query heads from ", row.first_head, ", ",
                                                   row.heads, " of them, of a model with ",
                                                   shape.heads));
  }
  if (row.first_head % shape.group() != 0 || row.heads % shape.group() != 0) {
    return absl::InvalidArgumentError(absl::StrCat("query heads from ", row.first_head, ", ",
                                                   row.heads, " of them, are not whole groups of ",
                                                   shape.group()));
  }
  if (!IsValid(row.q_dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("q_dtype ", static_cast<int>(row.q_dtype), " is unknown"));
  }
  if (row.budget.kind > Budget::Kind::kTopP) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget kind ", static_cast<int>(row.budget.kind), " is unknown"));
  }
  const uint64_t elements = uint64_t{row.heads} * shape.head_dim;
  AttendRowBytes bytes;
  bytes.q = elements * DTypeBytes(row.q_dtype);
  bytes.kv = row.has_token ? row.heads / shape.group() * shape.vector_bytes() : 0;
  bytes.o = elements * sizeof(float);
  bytes.lse = row.heads * sizeof(float);
  return bytes;
}

}  // namespace quarry
