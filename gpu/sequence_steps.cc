// Rows whose operations wait for nobody on the host: rung by the device, or with all K/V here.
#include <algorithm>
#include <memory>
#include <vector>

#include "gpu/row_step.h"
#include "gpu/sequence.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Rows of a step that may come again and whose memory is kept: decode's. More are a prompt's.
constexpr uint32_t kMaxKeptRows = 8;

}  // namespace

// Whether tokens are decode's, with all K/V here; a prefill would do the same in more operations.
bool Sequence::IsOwnStep(std::span<const uint32_t> tokens) const {
  return tokens_ > 0 && tokens.size() <= std::min(kMaxKeptRows, options_.max_attend_rows) &&
         options_.patterns == nullptr && options_.recorder == nullptr;
}

// step_ for so many rows, and room for their K/V.
absl::Status Sequence::PrepareStep(uint32_t rows) {
  if (step_ == nullptr || step_->rows() != rows) {
    RowStep::Options options;
    options.rows = rows;
    options.answers = service_ != nullptr ? LayerMath::Answers::kFar : LayerMath::Answers::kNone;
    options.recording =
        records_ && rows <= kMaxKeptRows ? options_.recording : RowStep::Recording::kOff;
    step_.reset();
    QUARRY_ASSIGN_OR_RETURN(step_, RowStep::Create(model_, device_, math_, shape_, options));
  }
  for (LocalKv& kv : local_) QUARRY_RETURN_IF_ERROR(kv.Extend(tokens_, rows));
  return absl::OkStatus();
}

// Of step_, which has run; it goes if another one could not profit by it.
void Sequence::CountStep() {
  for (const LocalKv& kv : local_) {
    const std::vector<DeviceKv> parts = kv.Parts();
    CountReach(math_.Attention(tokens_, step_->rows(), parts, {}));
  }
  if (step_->records()) return;
  records_ &= step_->rows() > kMaxKeptRows;
  step_.reset();
}

absl::StatusOr<std::vector<float>> Sequence::RunOwnRows(std::span<const uint32_t> tokens) {
  const auto rows = static_cast<uint32_t>(tokens.size());
  QUARRY_RETURN_IF_ERROR(PrepareStep(rows));
  QUARRY_RETURN_IF_ERROR(step_->Run(tokens, tokens_, local_, nullptr));
  absl::StatusOr<std::vector<float>> logits = step_->Logits(tokens_ + rows - 1);
  CountStep();
  tokens_ += rows;
  return logits;
}

absl::StatusOr<std::vector<float>> Sequence::RunRungRows(std::span<const uint32_t> tokens,
                                                         std::span<const AttendRow> asked) {
  const auto rows = static_cast<uint32_t>(tokens.size());
  QUARRY_RETURN_IF_ERROR(PrepareStep(rows));
  QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<RungAttends> rung,
                          service_->RingElsewhere(asked, shape_.layers));
  const absl::Status called = step_->Run(tokens, tokens_, local_, rung.get());
  // Then the device neither rings nor waits any more, and the messages may go back.
  const absl::StatusOr<std::vector<std::byte>> seen = step_->Outcomes();
  QUARRY_RETURN_IF_ERROR(called);
  QUARRY_RETURN_IF_ERROR(seen.status());
  const size_t outcome_bytes = RungOutcomeBytes(rows);
  std::vector<AttendRow> of_layer(asked.begin(), asked.end());
  std::vector<AttendAnswer> answers(rows);
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    const auto outcome = std::span(*seen).subspan(l * outcome_bytes, outcome_bytes);
    QUARRY_RETURN_IF_ERROR(rung->Read(l, outcome, answers));
    for (AttendRow& row : of_layer) row.layer = l;
    QUARRY_RETURN_IF_ERROR(TakeAnswers(of_layer, answers));
  }
  absl::StatusOr<std::vector<float>> logits = step_->Logits(tokens_ + rows - 1);
  CountStep();
  return logits;
}

}  // namespace quarry
