// Sequences that decode together.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/row_batch.h"
#include "gpu/sequence.h"

namespace quarry {

// Takes the next token of each of some sequences, of one model, device and service: weights are
// read once for all, and the daemon gets one message a layer. Not thread-safe.
class SequenceBatch {
 public:
  // Distinct, at least one; they outlive the batch.
  explicit SequenceBatch(std::vector<Sequence*> sequences);

  std::span<Sequence* const> sequences() const { return sequences_; }
  // As each one's Extend with its token and Role::kBudgeted, one after the other, but for rounding;
  // an error of one is no error of another. [sequences]
  std::vector<absl::StatusOr<std::vector<float>>> Extend(std::span<const uint32_t> tokens);
  // Of the step that is kept.
  uint64_t replayed_steps() const { return kept_.step != nullptr ? kept_.step->replays() : 0; }

 private:
  using Logits = absl::StatusOr<std::vector<float>>;

  // Whether the sequence's next token is a row of a batch.
  static bool TakesRow(const Sequence& sequence);
  static absl::StatusOr<Budget> PrepareRow(Sequence* sequence, std::span<const uint32_t> token);
  void RunTogether(std::span<const RowBatch::Member> members, std::span<Logits* const> out);

  const std::vector<Sequence*> sequences_;
  RowBatch::Kept kept_;
};

}  // namespace quarry
