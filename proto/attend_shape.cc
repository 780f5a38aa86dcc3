#include "proto/attend_shape.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {

namespace {

absl::Status Refused(absl::string_view field, float value, absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat("a budget's ", field, " of ", value, " is not ", allowed));
}

}  // namespace

absl::Status CheckBudget(const Budget& budget) {
  // Written so that NaN is refused too.
  switch (budget.kind) {
    case Budget::Kind::kUnlimited:
      return absl::OkStatus();
    case Budget::Kind::kFixedK:
      if (budget.k > 0) return absl::OkStatus();
      return absl::InvalidArgumentError("a fixed budget of 0 tokens: k is 0");
    case Budget::Kind::kTopP:
      if (budget.mass > 0 && budget.mass <= 1) return absl::OkStatus();
      return Refused("mass", budget.mass, "in (0, 1]");
    case Budget::Kind::kError:
      if (budget.error > 0 && budget.error < 1) return absl::OkStatus();
      return Refused("error", budget.error, "in (0, 1)");
    case Budget::Kind::kDipr:
      if (budget.beta >= 0 && budget.beta <= std::numeric_limits<float>::max()) {
        return absl::OkStatus();
      }
      return Refused("beta", budget.beta, "at least 0 and finite");
    case Budget::Kind::kSoftmaxLift:
      if (budget.k > 0) return absl::OkStatus();
      return absl::InvalidArgumentError("a sampling budget of 0 tokens: k is 0");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown budget kind ", static_cast<int>(budget.kind)));
}

absl::Status CheckRow(const AttendRow& row, const KvShape& shape) {
  if (row.layer >= shape.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("row of layer ", row.layer, " of ", shape.layers, " layers"));
  }
  if (row.range.lo > row.range.hi) {
    return absl::InvalidArgumentError(absl::StrCat("row of tokens [", row.range.lo, ", ",
                                                   row.range.hi, ") ends before it starts"));
  }
  if (row.heads == 0 || row.first_head >= shape.heads ||
      row.heads > shape.heads - row.first_head || row.first_head % shape.group() != 0 ||
      row.heads % shape.group() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "row of query heads [", row.first_head, ", ", uint64_t{row.first_head} + row.heads,
        "): whole groups of ", shape.group(), " within ", shape.heads, " heads are wanted"));
  }
  if (!IsValid(row.q_dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("q_dtype ", static_cast<int>(row.q_dtype), " is unknown"));
  }
  return CheckBudget(row.budget);
}

absl::Status CheckHasQueries(const AttendRow& row) {
  if (row.q != nullptr || row.range.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError("row without queries");
}

absl::StatusOr<AttendRowBytes> BytesOfRow(const AttendRow& row, const KvShape& shape) {
  QUARRY_RETURN_IF_ERROR(CheckRow(row, shape));
  const uint64_t elements = uint64_t{row.heads} * shape.head_dim;
  AttendRowBytes bytes;
  bytes.q = elements * DTypeBytes(row.q_dtype);
  bytes.kv = row.has_token ? row.heads / shape.group() * shape.vector_bytes() : 0;
  bytes.o = elements * sizeof(float);
  bytes.lse = row.heads * sizeof(float);
  return bytes;
}

}  // namespace quarry
