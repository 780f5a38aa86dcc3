// What a codec of K and V does to the answers of a trace's queries.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "absl/status/statusor.h"
#include "perf/trace.h"
#include "proto/kv_codec.h"

namespace quarry::perf {

// By test query and head.
struct CodecErrors {
  std::vector<double> o;    // relative L2 of the output
  std::vector<double> lse;  // absolute, of the log of the sum of exponentials
};

// Of K and V that were coded block by block, as a query finds them that is a token of that
// position: without the first and last tokens before it. In double over what codes mean as fp32.
CodecErrors ErrorsOn(const Trace& trace, const KvCoding& coding);

double Mean(const std::vector<double>& x);

// The value, or the end of the program with the status.
void Check(const absl::Status& status);
template <typename T>
T Check(absl::StatusOr<T> value) {
  Check(value.status());
  return *std::move(value);
}

}  // namespace quarry::perf
