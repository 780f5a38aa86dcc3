// What indexes that find lists of single tokens share: exact scores, and attention over them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/key_index.h"
#include "cpu_index/partial.h"

namespace quarry {

// A token that an index found for a query, and what it holds its score for.
struct Candidate {
  uint32_t token = 0;  // within the run's tokens
  float score = 0;     // q.k * scale
};

// Makes lists of them: found[i] is of query i, in any order, without repetition. Tokens outside
// the query's range are left out. `out->bytes` is left at 0.
void ListCandidates(TokenRange run, std::span<const TokenRange> ranges,
                    std::span<std::vector<Candidate>> found, CoarseScores* out);

// Overwrites the scores of lists of tokens with exact ones; adds the keys read, each counted once
// however many queries share it, to `lists->bytes`.
void RescoreCandidates(const KvView& run, const QueryBlock& queries, CoarseScores* lists);

// TokenIndex::Refine for lists of tokens with exact scores: reads nothing but the values allotted.
void AttendCandidates(const KvView& run, const QueryBlock& queries, const CoarseScores& lists,
                      const RunAllotment& allotment, std::span<Partial> acc);

}  // namespace quarry
