// How strong queries must be for their attention to be as concentrated as is wanted.
#pragma once

#include <span>

#include "cpu_index/key_index.h"

namespace quarry::perf {

struct MassTarget {
  double share = 0.9;   // of the softmax mass
  double tokens = 300;  // that hold it, in the median over the queries
};

// The factor of all queries' scores with which the median number of best tokens that hold the
// share of the mass is the wanted one: the smallest with which it is not larger. `queries`: their
// ranges are of equal length, and lie within the head. Takes 4 bytes for each score.
float ScaleForMass(const KvView& head, const QueryBlock& queries, const MassTarget& target);

}  // namespace quarry::perf
