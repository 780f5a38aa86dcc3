// The daemon's own indexes, each with a sweep of its knobs.
#pragma once

#include <vector>

#include "perf/retrieval/index_specs.h"

namespace quarry::perf {

std::vector<IndexSpec> OwnSpecs();

}  // namespace quarry::perf
