// Rows that attend the window here and the rest in the daemon, or have all K/V here: few tokens of
// one sequence, or the next token of each of several, which go through the layers together.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/row_step.h"
#include "proto/retrieval_types.h"

namespace quarry {

class Sequence;

// One run of the rows. The sequences have windows, know the tokens' ids, and are left as they are
// but for K and V behind their tokens, and costs. Not thread-safe.
class RowBatch {
 public:
  struct Member {
    Sequence* sequence = nullptr;
    std::span<const uint32_t> tokens;  // one, where there are several members
    Budget budget;
  };
  // What stays from one batch of the same sequences to the next.
  struct Kept {
    std::unique_ptr<RowStep> step;  // null: none, or it was of no more use
    bool records = true;            // false: the device kept no step of so few rows
  };

  // Rows of a step that may come again and whose memory is kept: decode's. More rows of one
  // sequence are a prompt's.
  static constexpr uint32_t kMaxKeptRows = 8;

  // Of one model, device, service and shape. draws: of each member, or none: logits are wanted. All
  // outlive the batch.
  RowBatch(std::span<const Member> members, std::span<const TokenDraw> draws, Kept* kept);
  // What comes after each member's last token. An error is of all members: some layers may have
  // stored rows, here and in the daemon.
  absl::StatusOr<std::vector<Prediction>> Run();

 private:
  using Predictions = absl::StatusOr<std::vector<Prediction>>;

  bool KeepsRows() const { return members_.size() > 1 || rows_ <= kMaxKeptRows; }
  Sequence& first() const { return *members_.front().sequence; }
  std::vector<AttendRow> AskedRows(uint32_t layer) const;
  // The host sends them, layer by layer.
  Predictions RunSent();
  absl::Status AttendSent(uint32_t layer, LayerScratch* scratch);
  // Without the host on the path; nothing is asked where there is no daemon.
  Predictions RunStep(std::span<const AttendRow> asked);
  absl::Status PrepareStep();
  absl::Status TakeRung(const RungAttends& rung, std::span<const std::byte> seen,
                        std::span<const AttendRow> asked);
  absl::Status TakeAnswers(std::span<const AttendRow> asked, std::span<const AttendAnswer> answers);
  void CountStep();

  const std::span<const Member> members_;
  const std::span<const TokenDraw> draws_;
  Kept* const kept_;
  uint32_t rows_ = 0;           // of all members
  std::vector<uint32_t> ids_;   // of the rows
  std::vector<uint32_t> last_;  // the number of each member's last token
};

}  // namespace quarry
