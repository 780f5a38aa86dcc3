#include "cpu_index/baselines/baselines.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "cpu_index/baselines/kinds.h"
#include "cpu_index/candidates.h"

namespace quarry {

std::string_view BaselineName(BaselineKind kind) {
  switch (kind) {
    case BaselineKind::kFaissFlat:
      return "faiss-flat";
    case BaselineKind::kFaissIvfFlat:
      return "faiss-ivf-flat";
    case BaselineKind::kFaissIvfPq:
      return "faiss-ivf-pq";
    case BaselineKind::kHnsw:
      return "hnsw";
  }
  return "unknown";
}

void BaselineIndex::AttendAll(const KvView& run, const QueryBlock& queries,
                              std::span<Partial> acc) const {
  ExactScan().AttendAll(run, queries, acc);
}

void BaselineIndex::Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
                           const RunAllotment& allotment, std::span<Partial> acc) const {
  AttendCandidates(run, queries, coarse, allotment, acc);
}

absl::StatusOr<std::unique_ptr<BaselineIndex>> BuildBaseline(BaselineKind kind, const KvView& run,
                                                             const BaselineOptions& options) {
  if (run.tokens().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(BaselineName(kind)), ": a run of no tokens cannot be indexed"));
  }
  return kind == BaselineKind::kHnsw ? BuildHnsw(run, options) : BuildFaiss(kind, run, options);
}

}  // namespace quarry
