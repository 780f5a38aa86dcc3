#include "gpu/sequence_batch.h"

#include <algorithm>
#include <utility>

#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {

SequenceBatch::SequenceBatch(std::vector<Sequence*> sequences) : sequences_(std::move(sequences)) {
  QUARRY_CHECK(!sequences_.empty());
  const Sequence& first = *sequences_.front();
  for (const Sequence* s : sequences_) {
    QUARRY_CHECK(&s->model_ == &first.model_ && &s->device_ == &first.device_ &&
                 s->service_ == first.service_ && s->shape_ == first.shape_);
  }
}

bool SequenceBatch::TakesRow(const Sequence& sequence, std::span<const uint32_t> token) {
  if (sequence.service_ == nullptr) return sequence.IsOwnStep(token);
  if (!sequence.AttendsByRows(token) || sequence.options_.recorder != nullptr) return false;
  return sequence.shifted_.empty() || sequence.shifted_.front().tokens.lo != sequence.tokens_;
}

absl::StatusOr<Budget> SequenceBatch::PrepareRow(Sequence* sequence,
                                                 std::span<const uint32_t> token) {
  if (sequence->service_ == nullptr) return Budget{};
  QUARRY_RETURN_IF_ERROR(sequence->DeclareNew(token));
  QUARRY_RETURN_IF_ERROR(sequence->LoadWindow());
  return sequence->SettleBudget(Sequence::Role::kBudgeted);
}

std::vector<absl::StatusOr<std::vector<float>>> SequenceBatch::Extend(
    std::span<const uint32_t> tokens) {
  std::vector<absl::StatusOr<std::vector<float>>> out;
  for (Outcome& outcome : ExtendFor(tokens, {})) {
    outcome.ok() ? out.emplace_back(std::move(outcome->logits))
                 : out.emplace_back(outcome.status());
  }
  return out;
}

std::vector<absl::StatusOr<uint32_t>> SequenceBatch::ExtendAndDraw(
    std::span<const uint32_t> tokens, std::span<const TokenDraw> draws) {
  QUARRY_CHECK(draws.size() == sequences_.size());
  std::vector<absl::StatusOr<uint32_t>> out;
  for (const Outcome& outcome : ExtendFor(tokens, draws)) {
    outcome.ok() ? out.emplace_back(outcome->token) : out.emplace_back(outcome.status());
  }
  return out;
}

std::vector<SequenceBatch::Outcome> SequenceBatch::ExtendFor(std::span<const uint32_t> tokens,
                                                             std::span<const TokenDraw> draws) {
  QUARRY_CHECK(tokens.size() == sequences_.size());
  std::vector<Outcome> out(sequences_.size());
  std::vector<RowBatch::Member> members;
  std::vector<TokenDraw> of_members;
  std::vector<Outcome*> outcomes;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    Sequence* const sequence = sequences_[i];
    const std::span<const uint32_t> token = tokens.subspan(i, 1);
    const std::span<const TokenDraw> draw = draws.empty() ? draws : draws.subspan(i, 1);
    if (absl::Status checked = sequence->Check(token); !checked.ok()) {
      out[i] = checked;
    } else if (!TakesRow(*sequence, token)) {
      out[i] = sequence->ExtendFor(token, Sequence::Role::kBudgeted, draw);
    } else if (const auto budget = PrepareRow(sequence, token); !budget.ok()) {
      out[i] = sequence->Break(budget.status());
    } else {
      members.push_back({sequence, token, *budget});
      of_members.insert(of_members.end(), draw.begin(), draw.end());
      outcomes.push_back(&out[i]);
    }
  }
  const size_t step = sequences_.front()->RowsPerMessage();
  kept_.resize(std::max(kept_.size(), (members.size() + step - 1) / step));
  for (size_t at = 0; at < members.size(); at += step) {
    const size_t rows = std::min(step, members.size() - at);
    const auto some =
        draws.empty() ? draws : std::span<const TokenDraw>(of_members).subspan(at, rows);
    if (rows == 1) {  // by a step of its own
      *outcomes[at] =
          members[at].sequence->ExtendFor(members[at].tokens, Sequence::Role::kBudgeted, some);
    } else {
      RunTogether(std::span(members).subspan(at, rows), some, std::span(outcomes).subspan(at, rows),
                  &kept_[at / step]);
    }
  }
  return out;
}

uint64_t SequenceBatch::replayed_steps() const {
  uint64_t replays = 0;
  for (const RowBatch::Kept& kept : kept_) replays += kept.step ? kept.step->replays() : 0;
  return replays;
}

void SequenceBatch::RunTogether(std::span<const RowBatch::Member> members,
                                std::span<const TokenDraw> draws, std::span<Outcome* const> out,
                                RowBatch::Kept* kept) {
  std::vector<AttendCost> before;
  for (const RowBatch::Member& member : members) before.push_back(member.sequence->cost_);
  auto predictions = RowBatch(members, draws, kept).Run();
  for (size_t m = 0; m < members.size(); ++m) {
    Sequence* const sequence = members[m].sequence;
    if (predictions.ok()) {
      sequence->Advance(1);
      *out[m] = std::move((*predictions)[m]);
    } else if (absl::IsUnavailable(predictions.status())) {
      *out[m] = sequence->Break(predictions.status());
    } else {
      // Whose row it was that failed is seen when each runs by itself.
      sequence->cost_ = before[m];
      const absl::Status recovered = sequence->Recover();
      *out[m] = recovered.ok() ? sequence->ExtendFor(members[m].tokens, Sequence::Role::kBudgeted,
                                                     draws.empty() ? draws : draws.subspan(m, 1))
                               : Outcome(sequence->Break(recovered));
    }
  }
}

}  // namespace quarry
