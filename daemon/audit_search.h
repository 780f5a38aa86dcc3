// The search of clusters that an audited answer came from, done again.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cpu_index/cluster_index.h"
#include "daemon/audited_query.h"
#include "daemon/block_table.h"
#include "proto/types.h"

namespace quarry {

// A run of the query's range that clusters answered.
struct AuditedRun {
  const ClusterIndex* clusters = nullptr;
  const RunUse* use = nullptr;
  TokenRange range;  // of it, that the query saw
};

// Searches the runs as the live answer's search did, those of one model and turn at once and with
// the cap of all, but without the history of live searches: where these scan there is nothing to
// measure. other_length: [heads], as ClusterLimits'. Appends the tokens that are read one by one to
// `read`; their order says nothing. False: stopped, which is asked between two runs. Any thread.
bool SearchAgain(const AuditedQuery& query, const KvShape& shape, std::span<const AuditedRun> runs,
                 std::span<const float> other_length, const std::function<bool()>& stop,
                 std::vector<uint32_t>* read);

}  // namespace quarry
