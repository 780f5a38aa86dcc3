// Every key of a graph can be found.
#pragma once

#include <vector>

#include "cpu_index/graph_build.h"

namespace quarry {

// Which keys links lead to from the entries, [keys].
std::vector<bool> Reached(const GraphLinks& graph);

// Adds links until every key is reached from the entries. Every key must have room for one more
// link, and there must be an entry. A key that is not reached is linked from one of those it links
// to itself, where there is room, so mostly from near it. One visit of every link.
void ReachAll(GraphLinks* graph);

}  // namespace quarry
