// Sequences that decode together.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/row_batch.h"
#include "gpu/sequence.h"

namespace quarry {

// Takes the next token of each of some sequences, of one model, device and service: the rows of one
// message to the daemon, mostly all, go through the layers together, and weights are read once for
// them. Not thread-safe.
class SequenceBatch {
 public:
  // Distinct, at least one; they outlive the batch.
  explicit SequenceBatch(std::vector<Sequence*> sequences);

  std::span<Sequence* const> sequences() const { return sequences_; }
  // As each one's Extend with its token and Role::kBudgeted, one after the other, but for rounding.
  // What one may not run is no error of another. Where the daemon voids a row, all rows of its
  // message are computed again, each by itself, on forks: a sequence for whose fork the daemon has
  // no memory fails with it. [sequences]
  std::vector<absl::StatusOr<std::vector<float>>> Extend(std::span<const uint32_t> tokens);
  // As each one's ExtendAndDraw. draws: [sequences]
  std::vector<absl::StatusOr<uint32_t>> ExtendAndDraw(std::span<const uint32_t> tokens,
                                                      std::span<const TokenDraw> draws);
  // Of the steps that are kept.
  uint64_t replayed_steps() const;

 private:
  using Outcome = absl::StatusOr<Prediction>;

  // Whether the sequence's next token is a row of a batch.
  static bool TakesRow(const Sequence& sequence, std::span<const uint32_t> token);
  static absl::StatusOr<Budget> PrepareRow(Sequence* sequence, std::span<const uint32_t> token);
  // draws: [sequences], or none; logits are wanted then.
  std::vector<Outcome> ExtendFor(std::span<const uint32_t> tokens,
                                 std::span<const TokenDraw> draws);
  // draws: [members], or none
  static void RunTogether(std::span<const RowBatch::Member> members,
                          std::span<const TokenDraw> draws, std::span<Outcome* const> out,
                          RowBatch::Kept* kept);

  const std::vector<Sequence*> sequences_;
  std::vector<RowBatch::Kept> kept_;  // of each message's rows
};

}  // namespace quarry
