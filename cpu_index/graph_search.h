// Best-first search of a graph for a group's queries at once.
#pragma once

#include "cpu_index/graph_build.h"
#include "cpu_index/key_index.h"

namespace quarry {

// Every query has a queue of the `queue` best keys met so far, and follows the links of the best
// whose links nobody has followed; each key met is read once and scored for all queries. Ends
// when the links of all keys in all queues have been followed. `out`: lists, for each query, of
// every key met in its range, with exact scores; `bytes` counts the keys and the lines of links.
// A query of a part of the run has a queue longer by as much as its part is smaller; short parts,
// and runs of up to four queues, are read instead.
void SearchGraph(const GraphLinks& graph, const KvView& run, const QueryBlock& queries,
                 uint32_t queue, CoarseScores* out);

}  // namespace quarry
