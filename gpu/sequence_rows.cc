// Rows: few tokens at a time, which attend the window here and the rest in the daemon.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/row_batch.h"
#include "gpu/sequence.h"
#include "proto/identity.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Of one message's rows and of its answers; half of a daemon's default slot.
constexpr size_t kMessageBytes = 4 << 20;

}  // namespace

// The budget of the next rows. K/V computed under one go to a context whose recipe says so.
absl::StatusOr<Budget> Sequence::SettleBudget(Role role) {
  if (role == Role::kPrompt) return Budget{};
  if (!settled_budget_) {
    settled_budget_ = options_.budget.budget;
    if (options_.budget.share > 0) {
      const uint32_t range = local_.front().Elsewhere(tokens_).size();
      settled_budget_->kind = Budget::Kind::kFixedK;
      settled_budget_->k = std::max(1u, static_cast<uint32_t>(options_.budget.share * range));
    }
  }
  NumericRecipe wanted = RecipeOf(*settled_budget_, options_.window.first, options_.window.last);
  // Exact attention over what sparse prefill computed keeps the prefill's recipe.
  if (wanted.dense() && options_.patterns != nullptr) wanted = RecipeOf(*options_.patterns);
  if (wanted != recipe_) QUARRY_RETURN_IF_ERROR(ForkContext(wanted));
  return *settled_budget_;
}

// Goes on in a fork of what is complete; the old context is closed.
absl::Status Sequence::ForkContext(const NumericRecipe& recipe) {
  QUARRY_ASSIGN_OR_RETURN(ContextId fork, service_->Fork({context_, tokens_, max_tokens_, recipe}));
  const absl::Status closed = service_->Close(std::exchange(context_, fork));
  recipe_ = recipe;
  shifted_.clear();  // the fork has only what is before it
  if (ids_.size() > tokens_) {
    QUARRY_RETURN_IF_ERROR(service_->DeclareTokens(context_, std::span(ids_).subspan(tokens_)));
  }
  return closed;
}

size_t Sequence::RowsPerMessage() const {
  const size_t row_bytes =
      2 * (size_t{shape_.heads} * shape_.head_dim * 4 + shape_.kv_heads * shape_.vector_bytes());
  return std::clamp<size_t>(kMessageBytes / row_bytes, 1, options_.rows_per_message);
}

absl::StatusOr<Prediction> Sequence::AttendRows(std::span<const uint32_t> tokens, Role role,
                                                Draw draw) {
  QUARRY_RETURN_IF_ERROR(LoadWindow());
  QUARRY_ASSIGN_OR_RETURN(const Budget budget, SettleBudget(role));
  const size_t step = RowsPerMessage();
  absl::StatusOr<Prediction> prediction;
  for (size_t at = 0; at < tokens.size(); at += step) {
    const std::span<const uint32_t> rows = tokens.subspan(at, std::min(step, tokens.size() - at));
    const AttendCost before = cost_;
    const Draw own = at + step < tokens.size() ? AnyDraw(draw) : draw;
    prediction = RunRows(rows, budget, own);
    if (!prediction.ok() && !absl::IsUnavailable(prediction.status())) {
      cost_ = before;  // what was voided
      QUARRY_RETURN_IF_ERROR(Recover());
      prediction = RunRows(rows, budget, own);
    }
    if (!prediction.ok()) return prediction;
    Advance(static_cast<uint32_t>(rows.size()));
  }
  return prediction;
}

// Some layers may have stored the voided tokens, here and in the daemon: both go back to what is
// complete.
absl::Status Sequence::Recover() {
  for (LocalKv& kv : local_) kv.Truncate(tokens_);
  ++cost_.recoveries;
  return service_ != nullptr ? ForkContext(recipe_) : absl::OkStatus();
}

absl::StatusOr<Prediction> Sequence::RunRows(std::span<const uint32_t> tokens, const Budget& budget,
                                             Draw draw) {
  const RowBatch::Member member{this, tokens, budget};
  QUARRY_ASSIGN_OR_RETURN(std::vector<Prediction> predictions,
                          RowBatch({&member, 1}, draw, &kept_).Run());
  return std::move(predictions.front());
}

// Goes on behind rows that have run.
void Sequence::Advance(uint32_t rows) {
  tokens_ += rows;
  for (LocalKv& kv : local_) kv.Slide(tokens_);
}

// Whether tokens are decode's, with all K/V here; a prefill would do the same in more operations.
bool Sequence::IsOwnStep(std::span<const uint32_t> tokens) const {
  return AttendsByRows(tokens) && tokens.size() <= RowBatch::kMaxKeptRows &&
         options_.patterns == nullptr && options_.recorder == nullptr;
}

absl::StatusOr<Prediction> Sequence::RunOwnRows(std::span<const uint32_t> tokens, Draw draw) {
  absl::StatusOr<Prediction> prediction = RunRows(tokens, {}, draw);
  if (prediction.ok()) Advance(static_cast<uint32_t>(tokens.size()));
  return prediction;
}

// What the daemon is asked for the next tokens of a layer, without buffers.
std::vector<AttendRow> Sequence::AskedRows(uint32_t layer, uint32_t rows,
                                           const Budget& budget) const {
  const TokenRange elsewhere = local_[layer].Elsewhere(tokens_);
  const DeviceAttention reach = math_.Attention(tokens_, rows, {}, {});
  std::vector<AttendRow> asked(rows);
  for (uint32_t r = 0; r < rows; ++r) {
    AttendRow& row = asked[r];
    row.context = context_;
    row.layer = layer;
    row.range = Intersect(elsewhere, reach.Visible(r));
    row.heads = shape_.heads;
    row.budget = budget;
    row.merged = budget.kind == Budget::Kind::kError;  // nothing else makes use of it
    row.has_token = true;
    row.token_position = tokens_ + r;
  }
  return asked;
}

// Their K/V are stored here; they are the scratch's rows from `at` on.
absl::Status Sequence::AttendWindow(uint32_t layer, uint32_t rows, const LayerScratch& scratch,
                                    uint32_t at) {
  const size_t skipped = at * shape_.kv_heads * shape_.vector_bytes();
  QUARRY_RETURN_IF_ERROR(
      local_[layer].Append(tokens_, rows, scratch.k.raw() + skipped, scratch.v.raw() + skipped));
  const std::vector<DeviceKv> parts = local_[layer].Parts();
  const DeviceAttention window = math_.Attention(tokens_, rows, parts, scratch, at);
  device_.Attend(window);
  CountReach(window);
  return absl::OkStatus();
}

void Sequence::CountReach(const DeviceAttention& attention) {
  for (uint32_t r = 0; r < attention.rows; ++r) {
    const TokenRange visible = attention.Visible(r);
    cost_.head_steps += attention.heads;
    cost_.tokens_in_reach += uint64_t{visible.size()} * attention.heads;
    for (const DeviceKv& part : attention.parts) {
      cost_.tokens_local += uint64_t{Intersect(part.tokens, visible).size()} * attention.heads;
    }
  }
}

// Whether every row was answered in full, and what it cost.
absl::Status Sequence::TakeAnswers(std::span<const AttendRow> asked,
                                   std::span<const AttendAnswer> answers) {
  for (size_t r = 0; r < asked.size(); ++r) {
    QUARRY_RETURN_IF_ERROR(answers[r].status);
    if (answers[r].covered != asked[r].range) {
      return absl::DataLossError(absl::StrCat(
          "layer ", asked[r].layer, ": the daemon covered tokens [", answers[r].covered.lo, ", ",
          answers[r].covered.hi, ") of [", asked[r].range.lo, ", ", asked[r].range.hi, ")"));
    }
    cost_.tokens_daemon += answers[r].tokens_attended;
    cost_.bytes_touched += answers[r].bytes_touched;
  }
  cost_.bytes_moved +=
      asked.size() * (2 * size_t{shape_.heads} * shape_.head_dim * 4 +
                      2 * shape_.kv_heads * shape_.vector_bytes() + shape_.heads * 4);
  return absl::OkStatus();
}

}  // namespace quarry
