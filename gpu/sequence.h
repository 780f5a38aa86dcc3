// One sequence of tokens running through a model: prefill, decode, and where its K/V lie.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/kv_service.h"
#include "gpu/layer_math.h"
#include "gpu/local_kv.h"
#include "gpu/model.h"
#include "gpu/query_recorder.h"
#include "gpu/row_batch.h"
#include "gpu/sparse/pattern.h"
#include "proto/retrieval_types.h"

namespace quarry {

// How much of the daemon's range a token attends.
struct AttendBudget {
  Budget budget;     // any kind
  double share = 0;  // > 0: fixed k of this share of the range, settled when first used
};

struct SequenceOptions {
  LocalKv::Window window;         // `everything` follows from there being no service
  KvMemory local_kv = KvMemory::kDevice;  // where the window's K/V lie, or all that are here
  DType kv_dtype = DType::kBf16;  // K/V are rounded to it before anybody attends them
  AttendBudget budget;            // of tokens that are not the prompt's
  // New tokens up to this many attend through the daemon, row by row; more are prefilled with the
  // prefix's K/V streamed through a layer buffer.
  uint32_t max_attend_rows = 256;
  // What the prompt has beyond the cached prefix may be reused where it is cached at another
  // position or behind other text: approximate, and so is all that is computed behind it.
  bool reuse_shifted = false;
  uint32_t rows_per_message = 64;  // fewer where a model's rows are large
  uint32_t prefill_rows = 4096;    // of a layer in work at a time
  uint32_t query_samples = 64;     // per layer of a prefill, for index building; 0: none
  // What heads attend in a prefill, but for tokens that attend row by row; outlives the sequence
  // and its forks. Null, or dense heads alone: everything. Its digest is the recipe of the K/V.
  const PatternFile* patterns = nullptr;
  // The device has mapped the service's channel (Device::MapHost): it sends rows and takes their
  // answers itself, with no thread of the host on the path, but where a recorder takes queries and
  // where a token's window holds all it sees.
  bool device_rings = false;
  // Whether steps of a few tokens that need no thread of the host are recorded (gpu/row_step.h),
  // where the device can; their memory stays then. Answers are the same, but for rounding where a
  // card cuts up attention for the length at which it was recorded.
  RowStep::Recording recording = RowStep::Recording::kOn;
  // Takes the sequence's queries, not those of its forks; outlives it. Null: nobody.
  QueryRecorder* recorder = nullptr;
};

// What attention cost, summed over rows, layers and heads. Rows of a prefill (the first, or one of
// more than max_attend_rows) count in bytes_moved alone.
struct AttendCost {
  uint64_t head_steps = 0;  // rows x layers x query heads
  uint64_t tokens_local = 0;
  uint64_t tokens_daemon = 0;
  uint64_t tokens_in_reach = 0;  // what full attention would have attended
  uint64_t bytes_touched = 0;    // of K and V read by the daemon
  uint64_t bytes_moved = 0;      // between worker and daemon
  uint32_t recoveries = 0;       // voided chunks that were computed again
  AttendCost& operator+=(const AttendCost& other);
};

// Not thread-safe. Model, device and service outlive it.
class Sequence {
 public:
  // Opens a context for at most max_tokens tokens beginning with `prompt`; what the service has of
  // it is leased. Nothing is computed. FailedPrecondition beyond the model's maximum,
  // InvalidArgument for a token id outside the vocabulary (names id, place and vocabulary) and for
  // patterns of another shape; Unimplemented for patterns of a model with a sliding window.
  static absl::StatusOr<std::unique_ptr<Sequence>> Open(const Model& model, Device& device,
                                                        KvService* service,
                                                        const SequenceOptions& options,
                                                        std::span<const uint32_t> prompt,
                                                        uint32_t max_tokens);
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // Runs the next tokens and returns the logits after the last one. Prompt tokens attend all that
  // is before them; others attend within the budget. Tokens that the daemon has voided are
  // computed once more on a fork of what was complete; if that fails too, or the daemon
  // has gone (Unavailable), the error is returned and the sequence is of no more use.
  // Tokens that are reused at another position are skipped; others follow them, for there are
  // no logits of theirs.
  // InvalidArgument, with the sequence as it was: no tokens, an id outside the vocabulary, other
  // tokens than were declared when the sequence was opened, or an end among reused tokens.
  enum class Role { kPrompt, kBudgeted };
  absl::StatusOr<std::vector<float>> Extend(std::span<const uint32_t> tokens, Role role);
  // The same, but the device chooses the token that comes next, and its logits stay there.
  absl::StatusOr<uint32_t> ExtendAndDraw(std::span<const uint32_t> tokens, Role role,
                                         const TokenDraw& draw);

  // A sequence that goes on from here by itself.
  absl::StatusOr<std::unique_ptr<Sequence>> Fork();

  // K and V of all tokens of a layer, [token][kv_head][head_dim] each, in the context's dtype, from
  // the service or from here. The spans have that size.
  absl::Status ReadKv(uint32_t layer, std::span<std::byte> k, std::span<std::byte> v);

  const KvShape& shape() const { return shape_; }
  uint32_t tokens() const { return tokens_; }
  uint32_t reused_tokens() const { return reused_; }
  // So far; of another position or behind other text.
  uint32_t shifted_tokens() const { return shifted_tokens_; }
  uint32_t max_tokens() const { return max_tokens_; }
  ContextId context() const { return context_; }
  uint64_t local_kv_bytes() const;
  // Of the step that is kept: rows of the number that came last.
  uint64_t replayed_steps() const { return kept_.step != nullptr ? kept_.step->replays() : 0; }
  const AttendCost& cost() const { return cost_; }

 private:
  friend class RowBatch;
  friend class SequenceBatch;
  class Appender;  // sends K/V to the service while the next chunk or layer runs

  Sequence(const Model& model, Device& device, KvService* service, const SequenceOptions& options,
           const ModelSpec& spec, uint32_t max_tokens);

  absl::Status CheckPatterns() const;
  absl::Status CheckTokens(std::span<const uint32_t> tokens) const;
  absl::Status CheckDeclared(std::span<const uint32_t> tokens) const;
  absl::Status DeclareNew(std::span<const uint32_t> tokens);
  absl::Status CheckEnd(std::span<const uint32_t> tokens) const;
  // Whether Extend can begin.
  absl::Status Check(std::span<const uint32_t> tokens) const;
  // After an error; returns it with the token's number.
  absl::Status Break(const absl::Status& status);
  // `draw`: one, or none; logits are wanted then.
  using Draw = std::span<const TokenDraw>;
  static Draw AnyDraw(Draw draw);  // in place of it, for tokens that others follow
  absl::StatusOr<Prediction> ExtendFor(std::span<const uint32_t> tokens, Role role, Draw draw);
  absl::StatusOr<Prediction> Run(std::span<const uint32_t> tokens, Role role, Draw draw);
  bool AttendsByRows(std::span<const uint32_t> tokens) const;
  absl::StatusOr<Prediction> RunNext(std::span<const uint32_t> tokens, Role role, Draw draw);
  // Goes on behind the reused tokens that come next; returns how many there are.
  uint32_t SkipShifted();
  absl::StatusOr<DeviceBuffer> Embed(std::span<const uint32_t> tokens);
  // q: their queries, on the device.
  absl::Status Record(uint32_t layer, uint32_t first, uint32_t rows, const float* q);
  absl::Status ReadLocalKv(uint32_t layer, std::span<std::byte> k, std::span<std::byte> v);

  // sequence_prefill.cc: many tokens, a layer at a time, the layer's K/V in one buffer.
  absl::StatusOr<Prediction> Prefill(std::span<const uint32_t> tokens, Draw draw);
  absl::Status PrefillLayer(uint32_t layer, float* x, uint32_t rows, LayerScratch* scratch,
                            TokenSpan* buffer, Appender* appender);
  absl::Status StoreChunk(uint32_t layer, TokenRange chunk, TokenRange prefill,
                          const LayerScratch& scratch, TokenSpan* buffer, Appender* appender);
  bool IsSparse(uint32_t layer) const;
  absl::Status AttendLayerSparsely(uint32_t layer, float* x, TokenRange prefill,
                                   LayerScratch* scratch, const TokenSpan& buffer);
  absl::Status SendChunk(uint32_t layer, TokenRange range, TokenRange prefill,
                         const LayerScratch& scratch, Appender* appender);
  absl::Status LoadTokens(uint32_t layer, TokenRange range, LayerScratch* staging,
                          TokenSpan* to_span, LocalKv* to_window);
  absl::Status LoadWindow();

  // sequence_rows.cc: few tokens; the window here, the rest in the daemon, merged.
  size_t RowsPerMessage() const;
  absl::StatusOr<Prediction> AttendRows(std::span<const uint32_t> tokens, Role role, Draw draw);
  // row_batch.cc; without a daemon, all K/V are here.
  absl::StatusOr<Prediction> RunRows(std::span<const uint32_t> tokens, const Budget& budget,
                                     Draw draw);
  bool IsOwnStep(std::span<const uint32_t> tokens) const;
  absl::StatusOr<Prediction> RunOwnRows(std::span<const uint32_t> tokens, Draw draw);
  void Advance(uint32_t rows);
  std::vector<AttendRow> AskedRows(uint32_t layer, uint32_t rows, const Budget& budget) const;
  absl::Status AttendWindow(uint32_t layer, uint32_t rows, const LayerScratch& scratch,
                            uint32_t at);
  void CountReach(const DeviceAttention& attention);
  absl::Status TakeAnswers(std::span<const AttendRow> asked, std::span<const AttendAnswer> answers);

  absl::StatusOr<Budget> SettleBudget(Role role);
  absl::Status ForkContext(const NumericRecipe& recipe);
  absl::Status Recover();

  const Model& model_;
  Device& device_;
  KvService* const service_;  // null: full attention
  const SequenceOptions options_;
  const KvShape shape_;
  const RopeSpec rope_;
  const uint32_t max_tokens_;
  LayerMath math_;
  ContextId context_;
  NumericRecipe recipe_;
  std::optional<Budget> settled_budget_;
  std::vector<uint32_t> ids_;  // known to the service
  uint32_t tokens_ = 0;        // complete in all layers
  uint32_t reused_ = 0;
  std::vector<ShiftedRange> shifted_;  // reused tokens to come, in order
  uint32_t shifted_tokens_ = 0;        // gone by
  bool window_loaded_ = true;  // false: a reused prefix whose window is still to be read
  bool broken_ = false;
  std::vector<LocalKv> local_;  // by layer
  RowBatch::Kept kept_;         // of the latest rows
  AttendCost cost_;
};

}  // namespace quarry
