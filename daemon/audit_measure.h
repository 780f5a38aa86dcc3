// AuditMeasure: one live answer beside the exact one.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "daemon/audited_query.h"

namespace quarry {

// Of the group's query heads the worst, for each figure by itself.
struct AuditMeasure {
  double error = 0;       // ||o - exact|| / ||exact||, of the merged answer if the query says so
  double mass_error = 0;  // |e^(lse - exact lse) - 1|
  // What the budget's estimate is of, and the estimate: see AttendAnswer::error_estimate.
  double actual = 0, predicted = 0;
  // Budgets that drop what they do not attend: the share of the exact softmax mass attended, and
  // the share of the n tokens attended that are among the n best. For the latter the search is done
  // again, with the indexes of now; what is listed of a run is what counts as attended.
  // Budget::kError: the share of the exact softmax mass that lies on tokens that are read, by their
  // rows or whole, and of the 100 best tokens those that are; by the search done again. The others
  // are estimated, not dropped: a small share alone is no error.
  std::optional<double> mass, recall;
  // Indexes of runs may have answered, and all of them are learned again from this context's
  // queries: those of runs that came from another position are not.
  bool renewable = false;

  // Actual by predicted; errors that rounding alone can make count as equally small.
  double Ratio() const;
};

// Reads all of the query's range, and of the rest if it is merged: as costly as the exact answer,
// on the calling thread, in steps of `task_tokens`; and once more where the search is done again,
// in steps of whole runs. `stop` is asked between them; nullopt: it said so, or the answer is not
// finite (it lay in memory that its client can write).
std::optional<AuditMeasure> MeasureAudit(const AuditedQuery& query, const KvShape& shape,
                                         const BlockTable& table, uint32_t task_tokens,
                                         const std::function<bool()>& stop);

}  // namespace quarry
