#include "gpu/sequence.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/sparse/sparse_index.h"
#include "proto/status_macros.h"

namespace quarry {

AttendCost& AttendCost::operator+=(const AttendCost& o) {
  head_steps += o.head_steps;
  tokens_local += o.tokens_local;
  tokens_daemon += o.tokens_daemon;
  tokens_in_reach += o.tokens_in_reach;
  bytes_touched += o.bytes_touched;
  bytes_moved += o.bytes_moved;
  recoveries += o.recoveries;
  return *this;
}

Sequence::Sequence(const Model& model, Device& device, KvService* service,
                   const SequenceOptions& options, const ModelSpec& spec, uint32_t max_tokens)
    : model_(model),
      device_(device),
      service_(service),
      options_([&] {
        SequenceOptions own = options;
        own.window.everything = service == nullptr;
        return own;
      }()),
      shape_(spec.shape),
      rope_(spec.rope),
      max_tokens_(max_tokens),
      math_(model, device, spec.shape, spec.rope) {}

Sequence::~Sequence() {
  // An error has nobody to go to; the daemon closes the context with the session.
  if (service_ != nullptr && context_.value != 0) (void)service_->Close(context_);
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Open(const Model& model, Device& device,
                                                         KvService* service,
                                                         const SequenceOptions& options,
                                                         std::span<const uint32_t> prompt,
                                                         uint32_t max_tokens) {
  QUARRY_ASSIGN_OR_RETURN(ModelSpec spec, model.SpecFor(max_tokens, options.kv_dtype));
  auto out =
      std::unique_ptr<Sequence>(new Sequence(model, device, service, options, spec, max_tokens));
  QUARRY_RETURN_IF_ERROR(out->CheckTokens(prompt));
  QUARRY_RETURN_IF_ERROR(out->CheckPatterns());
  if (options.patterns != nullptr) out->recipe_ = RecipeOf(*options.patterns);
  for (uint32_t l = 0; l < spec.shape.layers; ++l) {
    out->local_.emplace_back(&device, spec.shape, out->options_.window, options.local_kv);
  }
  if (service == nullptr) return out;
  OpenRequest request;
  request.spec = std::move(spec);
  request.tokens.assign(prompt.begin(), prompt.end());
  request.max_tokens = max_tokens;
  request.recipe = out->recipe_;
  // What was computed exactly is as good as any.
  request.accepts = {NumericRecipe{}};
  if (!out->recipe_.dense()) request.accepts.push_back(out->recipe_);
  request.reuse_shifted = options.reuse_shifted;
  QUARRY_ASSIGN_OR_RETURN(OpenResult opened, service->Open(request));
  out->context_ = opened.context;
  out->ids_.assign(prompt.begin(), prompt.end());
  out->tokens_ = out->reused_ = opened.reused_tokens;
  out->shifted_ = opened.shifted;
  out->window_loaded_ = opened.reused_tokens == 0;
  return out;
}

absl::Status Sequence::CheckPatterns() const {
  const PatternFile* const patterns = options_.patterns;
  if (patterns == nullptr) return absl::OkStatus();
  if (patterns->layers != shape_.layers || patterns->heads != shape_.heads) {
    return absl::InvalidArgumentError(
        absl::StrCat("patterns of ", patterns->layers, " layers of ", patterns->heads, " heads (",
                     patterns->model, ") for a model of ", shape_.layers, " of ", shape_.heads));
  }
  if (RecipeOf(*patterns).dense()) return absl::OkStatus();
  if (model_.config().sliding_window != 0 &&
      model_.config().sliding_window < model_.config().max_tokens) {
    return absl::UnimplementedError(absl::StrCat("patterns for a model whose tokens see ",
                                                 model_.config().sliding_window, " tokens"));
  }
  if (options_.prefill_rows < kRowTile) {
    return absl::InvalidArgumentError(absl::StrCat("prefill_rows ", options_.prefill_rows,
                                                   " of a sparse prefill: less than ", kRowTile));
  }
  return absl::OkStatus();
}

absl::Status Sequence::CheckTokens(std::span<const uint32_t> tokens) const {
  const uint32_t vocab = model_.config().vocab;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= vocab) {
      return absl::InvalidArgumentError(absl::StrCat("token ", tokens_ + i,
                                                     " of the sequence has id ", tokens[i],
                                                     ", the vocabulary has ", vocab));
    }
  }
  if (tokens.size() > max_tokens_ - tokens_) {
    return absl::FailedPreconditionError(absl::StrCat(tokens.size(), " more tokens after ", tokens_,
                                                      " exceed the context's maximum of ",
                                                      max_tokens_));
  }
  return absl::OkStatus();
}

// The service names blocks by the ids it knows: K/V of other tokens must never go under them.
absl::Status Sequence::CheckDeclared(std::span<const uint32_t> tokens) const {
  for (size_t i = 0; i < tokens.size() && tokens_ + i < ids_.size(); ++i) {
    if (tokens[i] == ids_[tokens_ + i]) continue;
    return absl::InvalidArgumentError(absl::StrCat("token ", tokens_ + i, " has id ", tokens[i],
                                                   ", it was opened with ", ids_[tokens_ + i]));
  }
  return absl::OkStatus();
}

absl::Status Sequence::CheckEnd(std::span<const uint32_t> tokens) const {
  const uint64_t end = tokens_ + tokens.size();
  for (const ShiftedRange& range : shifted_) {
    if (end <= range.tokens.lo || end > range.tokens.hi) continue;
    return absl::InvalidArgumentError(absl::StrCat("tokens up to ", end, " end among [",
                                                   range.tokens.lo, ", ", range.tokens.hi,
                                                   "), which are reused and have no logits"));
  }
  return absl::OkStatus();
}

absl::Status Sequence::DeclareNew(std::span<const uint32_t> tokens) {
  const size_t known = std::min(tokens.size(), ids_.size() - tokens_);
  if (known == tokens.size()) return absl::OkStatus();
  QUARRY_RETURN_IF_ERROR(service_->DeclareTokens(context_, tokens.subspan(known)));
  ids_.insert(ids_.end(), tokens.begin() + known, tokens.end());
  return absl::OkStatus();
}

uint64_t Sequence::local_kv_bytes() const {
  uint64_t bytes = 0;
  for (const LocalKv& kv : local_) bytes += kv.bytes();
  return bytes;
}

absl::Status Sequence::Check(std::span<const uint32_t> tokens) const {
  if (broken_) return absl::FailedPreconditionError("the sequence has failed before");
  if (tokens.empty()) return absl::InvalidArgumentError("no tokens to run");
  QUARRY_RETURN_IF_ERROR(CheckTokens(tokens));
  QUARRY_RETURN_IF_ERROR(CheckDeclared(tokens));
  return CheckEnd(tokens);
}

absl::Status Sequence::Break(const absl::Status& status) {
  broken_ = true;
  return absl::Status(status.code(),
                      absl::StrCat("token ", tokens_, " is void: ", status.message()));
}

// The quickest, of what nobody wants.
Sequence::Draw Sequence::AnyDraw(Draw draw) {
  static constexpr TokenDraw kGreedy;
  return draw.empty() ? draw : Draw(&kGreedy, 1);
}

absl::StatusOr<std::vector<float>> Sequence::Extend(std::span<const uint32_t> tokens, Role role) {
  QUARRY_ASSIGN_OR_RETURN(Prediction prediction, ExtendFor(tokens, role, {}));
  return std::move(prediction.logits);
}

absl::StatusOr<uint32_t> Sequence::ExtendAndDraw(std::span<const uint32_t> tokens, Role role,
                                                 const TokenDraw& draw) {
  QUARRY_ASSIGN_OR_RETURN(const Prediction prediction, ExtendFor(tokens, role, {&draw, 1}));
  return prediction.token;
}

absl::StatusOr<Prediction> Sequence::ExtendFor(std::span<const uint32_t> tokens, Role role,
                                               Draw draw) {
  QUARRY_RETURN_IF_ERROR(Check(tokens));
  if (options_.recorder != nullptr && role == Role::kPrompt) {
    options_.recorder->BeginPrompt({tokens_, tokens_ + static_cast<uint32_t>(tokens.size())});
  }
  absl::StatusOr<Prediction> prediction = Run(tokens, role, draw);
  if (prediction.ok()) return prediction;
  return Break(prediction.status());
}

absl::StatusOr<Prediction> Sequence::Run(std::span<const uint32_t> tokens, Role role, Draw draw) {
  if (service_ == nullptr) {
    return IsOwnStep(tokens) ? RunOwnRows(tokens, draw) : Prefill(tokens, draw);
  }
  QUARRY_RETURN_IF_ERROR(DeclareNew(tokens));
  absl::StatusOr<Prediction> prediction;
  do {
    tokens = tokens.subspan(SkipShifted());
    const size_t next = shifted_.empty() ? tokens.size() : shifted_.front().tokens.lo - tokens_;
    const std::span<const uint32_t> piece = tokens.first(std::min(next, tokens.size()));
    prediction = RunNext(piece, role, piece.size() == tokens.size() ? draw : AnyDraw(draw));
    if (!prediction.ok()) return prediction;
    tokens = tokens.subspan(piece.size());
  } while (!tokens.empty());
  return prediction;
}

bool Sequence::AttendsByRows(std::span<const uint32_t> tokens) const {
  return tokens_ > 0 && tokens.size() <= options_.max_attend_rows;
}

absl::StatusOr<Prediction> Sequence::RunNext(std::span<const uint32_t> tokens, Role role,
                                             Draw draw) {
  return AttendsByRows(tokens) ? AttendRows(tokens, role, draw) : Prefill(tokens, draw);
}

uint32_t Sequence::SkipShifted() {
  const uint32_t first = tokens_;
  while (!shifted_.empty() && shifted_.front().tokens.lo == tokens_) {
    tokens_ = shifted_.front().tokens.hi;
    shifted_.erase(shifted_.begin());
  }
  if (tokens_ == first) return 0;
  // The window now ends with tokens that the service has.
  for (LocalKv& kv : local_) kv = LocalKv(&device_, shape_, options_.window, options_.local_kv);
  window_loaded_ = false;
  shifted_tokens_ += tokens_ - first;
  return tokens_ - first;
}

absl::StatusOr<DeviceBuffer> Sequence::Embed(std::span<const uint32_t> tokens) {
  const uint32_t hidden = model_.config().hidden;
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer x,
                          device_.Allocate(tokens.size() * hidden * 4, "hidden states"));
  QUARRY_RETURN_IF_ERROR(model_.Embed(tokens, x.floats()));
  return x;
}

absl::Status Sequence::Record(uint32_t layer, uint32_t first, uint32_t rows, const float* q) {
  if (options_.recorder == nullptr) return absl::OkStatus();
  return options_.recorder->Take(layer, first, rows, q, device_);
}

absl::Status Sequence::ReadKv(uint32_t layer, std::span<std::byte> k, std::span<std::byte> v) {
  if (service_ == nullptr) return ReadLocalKv(layer, k, v);
  const size_t token_bytes = shape_.kv_heads * shape_.vector_bytes();
  const uint32_t step = std::max(1u, options_.prefill_rows);
  for (uint32_t lo = 0; lo < tokens_; lo += step) {
    const TokenRange piece{lo, lo + std::min(step, tokens_ - lo)};
    const size_t at = lo * token_bytes, bytes = piece.size() * token_bytes;
    QUARRY_RETURN_IF_ERROR(
        service_->Read(context_, layer, piece, k.subspan(at, bytes), v.subspan(at, bytes)));
  }
  return absl::OkStatus();
}

// Here the tokens of one head lie together.
absl::Status Sequence::ReadLocalKv(uint32_t layer, std::span<std::byte> k, std::span<std::byte> v) {
  const size_t vector = shape_.vector_bytes();
  for (const DeviceKv& part : local_[layer].Parts()) {
    std::vector<std::byte> head(part.tokens.size() * vector);
    for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
      for (const auto& [to, from] : {std::pair{k, part.k}, {v, part.v}}) {
        QUARRY_RETURN_IF_ERROR(
            device_.Download(head, static_cast<const std::byte*>(from) + h * part.head_stride));
        for (uint32_t i = 0; i < part.tokens.size(); ++i) {
          const size_t row = (size_t{part.tokens.lo} + i) * shape_.kv_heads + h;
          std::memcpy(to.data() + row * vector, head.data() + i * vector, vector);
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Fork() {
  if (broken_) return absl::FailedPreconditionError("the sequence has failed before");
  if (service_ != nullptr) QUARRY_RETURN_IF_ERROR(LoadWindow());
  ModelSpec spec;
  spec.shape = shape_;
  spec.rope = rope_;
  SequenceOptions options = options_;
  options.recorder = nullptr;
  auto out = std::unique_ptr<Sequence>(
      new Sequence(model_, device_, service_, options, spec, max_tokens_));
  out->recipe_ = recipe_;
  out->settled_budget_ = settled_budget_;
  out->tokens_ = tokens_;
  out->reused_ = reused_;
  out->shifted_tokens_ = shifted_tokens_;
  for (const LocalKv& kv : local_) {
    QUARRY_ASSIGN_OR_RETURN(LocalKv copy, kv.Clone());
    out->local_.push_back(std::move(copy));
  }
  if (service_ != nullptr) {
    QUARRY_ASSIGN_OR_RETURN(out->context_,
                            service_->Fork({context_, tokens_, max_tokens_, recipe_}));
    out->ids_.assign(ids_.begin(), ids_.begin() + tokens_);
  }
  return out;
}

}  // namespace quarry
