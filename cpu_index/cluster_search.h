// The search of clustered indexes: all runs of a query that share a model, at once.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/cluster_index.h"
#include "cpu_index/key_index.h"

namespace quarry {

// One run that is searched.
struct ClusterRun {
  const ClusterIndex* index = nullptr;
  const KvView* view = nullptr;          // that the index fits
  std::span<const TokenRange> ranges;    // [queries] of tokens that each query sees of it
};

// How far a search goes. A query's answer is estimated where it is not read; its predicted error
// (Partial::doubt) is to be at most `tolerance` of the length of what the answer is merged with,
// the answer itself included.
struct ClusterLimits {
  float tolerance = 0;         // 0: every token's key and value are read
  uint32_t most_tokens = ~0u;  // read one by one for a query
  // [queries] log of the length of the sum of e^score * value over what the answer will be merged
  // with, as far as it is known: it makes errors here matter less. Empty: nothing is.
  std::span<const float> other_length;
  // What calibration forces. Depths: supers alone; all leaves; all codes; and then the rows, or the
  // keys and values, of so many best tokens of each query.
  enum class Depth { kAsNeeded, kSupers, kLeaves, kCodes, kRows, kExact };
  Depth depth = Depth::kAsNeeded;
  uint32_t best_tokens = 0;
};

// Attention of every query over the tokens that it sees of `runs`, all of one model, merged into acc
// [queries]; the bytes of all of it go to acc[0]. queries.ranges is not used. Cost: see README.md.
// refined: may be null; the tokens whose rows, or keys and values, were read, in no order.
void SearchClusters(std::span<const ClusterRun> runs, const QueryBlock& queries,
                    const ClusterLimits& limits, std::span<Partial> acc,
                    std::vector<uint32_t>* refined = nullptr);

}  // namespace quarry
