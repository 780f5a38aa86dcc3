#include "gpu/row_batch.h"

#include <algorithm>
#include <utility>

#include "gpu/sequence.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// The daemon's poller spins while a token is in work.
struct Armed {
  explicit Armed(KvService* s) : service(s) { service->Arm(true); }
  ~Armed() { service->Arm(false); }
  KvService* const service;
};

}  // namespace

RowBatch::RowBatch(std::span<const Member> members, std::span<const TokenDraw> draws, Kept* kept)
    : members_(members), draws_(draws), kept_(kept) {
  for (const Member& member : members) {
    QUARRY_CHECK(!member.tokens.empty() && (members.size() == 1 || member.tokens.size() == 1));
    rows_ += static_cast<uint32_t>(member.tokens.size());
    ids_.insert(ids_.end(), member.tokens.begin(), member.tokens.end());
    last_.push_back(member.sequence->tokens_ + static_cast<uint32_t>(member.tokens.size()) - 1);
  }
}

RowBatch::Predictions RowBatch::Run() {
  KvService* const service = first().service_;
  if (service == nullptr) return RunStep({});
  const Armed armed(service);
  const bool own =
      first().options_.device_rings && std::ranges::all_of(members_, [](const Member& member) {
        return member.sequence->options_.recorder == nullptr;
      });
  if (own) {
    const std::vector<AttendRow> asked = AskedRows(0);
    const bool all_ask =
        std::ranges::none_of(asked, [](const AttendRow& row) { return row.range.empty(); });
    if (all_ask) return RunStep(asked);
  }
  return RunSent();
}

std::vector<AttendRow> RowBatch::AskedRows(uint32_t layer) const {
  std::vector<AttendRow> asked;
  for (const Member& member : members_) {
    const auto rows = static_cast<uint32_t>(member.tokens.size());
    const auto of_one = member.sequence->AskedRows(layer, rows, member.budget);
    asked.insert(asked.end(), of_one.begin(), of_one.end());
  }
  return asked;
}

RowBatch::Predictions RowBatch::RunSent() {
  LayerMath& math = first().math_;
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer x, first().Embed(ids_));
  QUARRY_ASSIGN_OR_RETURN(LayerScratch scratch, math.Allocate(rows_, LayerMath::Answers::kFar));
  std::vector<TokenRows> tokens;
  for (const Member& member : members_) {
    tokens.push_back({member.sequence->tokens_, static_cast<uint32_t>(member.tokens.size()),
                      &member.sequence->rope_});
  }
  const size_t q_width = size_t{first().shape_.heads} * first().shape_.head_dim;
  for (uint32_t l = 0; l < first().shape_.layers; ++l) {
    math.Project(l, x.floats(), tokens, &scratch);
    const float* q = scratch.q.floats();
    for (size_t m = 0; m < members_.size(); ++m) {
      QUARRY_RETURN_IF_ERROR(members_[m].sequence->Record(l, tokens[m].first, tokens[m].rows, q));
      q += tokens[m].rows * q_width;
    }
    QUARRY_RETURN_IF_ERROR(AttendSent(l, &scratch));
    math.Finish(l, x.floats(), rows_, &scratch);
  }
  // With several members, all rows are last ones.
  const size_t skipped = rows_ - members_.size();
  return math.PredictFrom(x.floats() + skipped * first().model_.config().hidden, last_, draws_);
}

absl::Status RowBatch::AttendSent(uint32_t layer, LayerScratch* scratch) {
  Device& device = first().device_;
  const KvShape& shape = first().shape_;
  const size_t q_width = size_t{shape.heads} * shape.head_dim;
  const size_t kv_bytes = shape.kv_heads * shape.vector_bytes();
  std::vector<float> q(rows_ * q_width), o(q.size()), lse(size_t{rows_} * shape.heads);
  std::vector<std::byte> k(rows_ * kv_bytes), v(k.size());
  QUARRY_RETURN_IF_ERROR(device.Download(std::as_writable_bytes(std::span(q)), scratch->q.raw()));
  QUARRY_RETURN_IF_ERROR(device.Download(k, scratch->k.raw()));
  QUARRY_RETURN_IF_ERROR(device.Download(v, scratch->v.raw()));
  std::vector<AttendRow> asked = AskedRows(layer);
  std::vector<AttendAnswer> answers(rows_);
  for (uint32_t r = 0; r < rows_; ++r) {
    asked[r].q = q.data() + r * q_width;
    asked[r].k = k.data() + r * kv_bytes;
    asked[r].v = v.data() + r * kv_bytes;
    answers[r].o = std::span(o).subspan(r * q_width, q_width);
    answers[r].lse = std::span(lse).subspan(size_t{r} * shape.heads, shape.heads);
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<PendingAttend> pending,
                          first().service_->Attend(asked, answers));
  // The windows, while the daemon works. Its answers are waited for whatever happens here.
  absl::Status local;
  uint32_t at = 0;
  for (const Member& member : members_) {
    const auto rows = static_cast<uint32_t>(member.tokens.size());
    local.Update(member.sequence->AttendWindow(layer, rows, *scratch, at));
    at += rows;
  }
  QUARRY_RETURN_IF_ERROR(pending->Wait());
  QUARRY_RETURN_IF_ERROR(local);
  QUARRY_RETURN_IF_ERROR(TakeAnswers(asked, answers));
  QUARRY_RETURN_IF_ERROR(device.Upload(scratch->far_o.raw(), std::as_bytes(std::span(o))));
  QUARRY_RETURN_IF_ERROR(device.Upload(scratch->far_lse.raw(), std::as_bytes(std::span(lse))));
  device.Merge(scratch->o.floats(), scratch->lse.floats(), scratch->far_o.floats(),
               scratch->far_lse.floats(), lse.size(), shape.head_dim);
  return absl::OkStatus();
}

// The kept step, for so many rows, and room for their K/V.
absl::Status RowBatch::PrepareStep() {
  RowStep::Options options;
  options.sequences = static_cast<uint32_t>(members_.size());
  options.rows = rows_ / options.sequences;
  std::unique_ptr<RowStep>& step = kept_->step;
  if (step == nullptr || step->sequences() != options.sequences || step->rows() != rows_) {
    options.answers =
        first().service_ != nullptr ? LayerMath::Answers::kFar : LayerMath::Answers::kNone;
    options.recording =
        kept_->records && KeepsRows() ? first().options_.recording : RowStep::Recording::kOff;
    step.reset();
    QUARRY_ASSIGN_OR_RETURN(step, RowStep::Create(first().model_, first().device_, first().math_,
                                                  first().shape_, options));
  }
  for (const Member& member : members_) {
    for (LocalKv& kv : member.sequence->local_) {
      QUARRY_RETURN_IF_ERROR(
          kv.Extend(member.sequence->tokens_, static_cast<uint32_t>(member.tokens.size())));
    }
  }
  return absl::OkStatus();
}

RowBatch::Predictions RowBatch::RunStep(std::span<const AttendRow> asked) {
  QUARRY_RETURN_IF_ERROR(PrepareStep());
  RowStep& step = *kept_->step;
  std::unique_ptr<RungAttends> rung;
  if (!asked.empty()) {
    QUARRY_ASSIGN_OR_RETURN(rung, first().service_->RingElsewhere(asked, first().shape_.layers));
  }
  std::vector<RowStep::Member> members;
  for (const Member& member : members_) {
    members.push_back({member.sequence->tokens_, &member.sequence->rope_, member.sequence->local_});
  }
  const absl::Status called = step.Run(ids_, members, rung.get());
  if (rung != nullptr) {
    // Then the device neither rings nor waits any more, and the messages may go back.
    const absl::StatusOr<std::vector<std::byte>> seen = step.Outcomes();
    QUARRY_RETURN_IF_ERROR(called);
    QUARRY_RETURN_IF_ERROR(seen.status());
    QUARRY_RETURN_IF_ERROR(TakeRung(*rung, *seen, asked));
  }
  QUARRY_RETURN_IF_ERROR(called);
  Predictions predictions = step.Predict(last_, draws_);
  CountStep();
  return predictions;
}

absl::Status RowBatch::TakeRung(const RungAttends& rung, std::span<const std::byte> seen,
                                std::span<const AttendRow> asked) {
  const size_t outcome_bytes = RungOutcomeBytes(rows_);
  std::vector<AttendRow> of_layer(asked.begin(), asked.end());
  std::vector<AttendAnswer> answers(rows_);
  for (uint32_t l = 0; l < first().shape_.layers; ++l) {
    const auto outcome = seen.subspan(l * outcome_bytes, outcome_bytes);
    QUARRY_RETURN_IF_ERROR(rung.Read(l, outcome, answers));
    for (AttendRow& row : of_layer) row.layer = l;
    QUARRY_RETURN_IF_ERROR(TakeAnswers(of_layer, answers));
  }
  return absl::OkStatus();
}

absl::Status RowBatch::TakeAnswers(std::span<const AttendRow> asked,
                                   std::span<const AttendAnswer> answers) {
  size_t at = 0;
  for (const Member& member : members_) {
    const size_t rows = member.tokens.size();
    QUARRY_RETURN_IF_ERROR(
        member.sequence->TakeAnswers(asked.subspan(at, rows), answers.subspan(at, rows)));
    at += rows;
  }
  return absl::OkStatus();
}

// Of the kept step, which has run; it goes if another one could not profit by it.
void RowBatch::CountStep() {
  for (const Member& member : members_) {
    Sequence& sequence = *member.sequence;
    for (const LocalKv& kv : sequence.local_) {
      const std::vector<DeviceKv> parts = kv.Parts();
      sequence.CountReach(sequence.math_.Attention(
          sequence.tokens_, static_cast<uint32_t>(member.tokens.size()), parts, {}));
    }
  }
  if (kept_->step->records()) return;
  kept_->records &= !KeepsRows();
  kept_->step.reset();
}

}  // namespace quarry
