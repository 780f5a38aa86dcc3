// The code scan: every key's code is read, the best few keys are scored exactly.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_codes.h"
#include "cpu_index/key_index.h"

namespace quarry {

// An index of one run. Sequential reads of 16 bytes a key for all queries together, then random
// reads of the candidates' keys. Nothing that has a high score hides: heads whose mass lies on
// single tokens are served by it. Thread-safe but for set_candidates.
class CodeScan final : public TokenIndex {
 public:
  // queries: [n][head_dim], sampled, scaled as scores are; may be empty.
  static absl::StatusOr<std::unique_ptr<CodeScan>> Build(const KvView& run,
                                                         std::span<const float> queries);

  // What Serialize made. DataLoss or InvalidArgument: anything else.
  static absl::StatusOr<std::unique_ptr<CodeScan>> Deserialize(std::span<const std::byte> bytes);
  // Equal runs and queries give equal bytes on machines with the same kernels. How many candidates
  // searches take is not kept.
  std::vector<std::byte> Serialize() const;

  std::string_view kind() const override { return "codes"; }
  bool Fits(const KvView& run) const override {
    return run.tokens().size() == codes_.keys() && run.head_dim == codes_.basis().head_dim;
  }
  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override;
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override;
  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
              const RunAllotment& allotment, std::span<Partial> acc) const override;

  // How many keys of the run are scored exactly for each query, and so can be attended; by the
  // scores of the codes, ties included. Not while the index is searched.
  void set_candidates(uint32_t candidates) { candidates_ = candidates; }
  uint64_t memory_bytes() const { return codes_.memory_bytes(); }

 private:
  explicit CodeScan(KeyCodes codes) : codes_(std::move(codes)) {}

  const KeyCodes codes_;
  uint32_t candidates_ = 1024;
};

}  // namespace quarry
