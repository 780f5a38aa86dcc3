// What a codec of K and V does to the answers of a trace's queries.
#pragma once

#include <vector>

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

}  // namespace quarry::perf
