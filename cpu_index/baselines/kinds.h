// The constructors behind BuildBaseline, one per library.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "cpu_index/baselines/baselines.h"

namespace quarry {

absl::StatusOr<std::unique_ptr<BaselineIndex>> BuildFaiss(BaselineKind kind, const KvView& run,
                                                          const BaselineOptions& options);
absl::StatusOr<std::unique_ptr<BaselineIndex>> BuildHnsw(const KvView& run,
                                                         const BaselineOptions& options);

}  // namespace quarry
