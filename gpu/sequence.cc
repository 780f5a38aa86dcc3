#include "gpu/sequence.h"

#include <algorithm>
#include <future>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/half.h"
#include "proto/identity.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Rows of the MLP in work at a time: bounds its activations, large enough for the products.
constexpr size_t kMlpRows = 1024;

}  // namespace

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

// Activations of `rows` consecutive tokens.
struct Sequence::Chunk {
  uint32_t first = 0, rows = 0;
  DeviceBuffer x;          // [rows][hidden]: the residual stream
  DeviceBuffer norm;       // [rows][hidden]
  DeviceBuffer q, o;       // [rows][heads][head_dim]
  DeviceBuffer lse;        // [rows][heads]
  DeviceBuffer k, v;       // [rows][kv_heads][head_dim], fp32
  std::vector<std::byte> k_stored, v_stored;  // the same in the context's dtype
};

// One append in flight beside the computation; K and V are copied out of the chunk.
class Sequence::Appender {
 public:
  explicit Appender(KvService* service) : service_(service) {}
  ~Appender() { (void)Finish(); }

  absl::Status Start(AppendRequest request, std::vector<std::byte> k, std::vector<std::byte> v,
                     std::vector<float> samples, std::vector<uint32_t> positions) {
    QUARRY_RETURN_IF_ERROR(Finish());
    k_ = std::move(k);
    v_ = std::move(v);
    samples_ = std::move(samples);
    positions_ = std::move(positions);
    request.k = k_.data();
    request.v = v_.data();
    request.query_samples = samples_.data();
    request.query_positions = positions_;
    pending_ = std::async(std::launch::async,
                          [service = service_, request] { return service->Append(request); });
    return absl::OkStatus();
  }
  absl::Status Finish() { return pending_.valid() ? pending_.get() : absl::OkStatus(); }

 private:
  KvService* const service_;
  std::vector<std::byte> k_, v_;
  std::vector<float> samples_;
  std::vector<uint32_t> positions_;
  std::future<absl::Status> pending_;
};

Sequence::Sequence(const Model& model, Device& device, KvService* service,
                   const SequenceOptions& options)
    : model_(model), device_(device), service_(service), options_(options) {}

Sequence::~Sequence() {
  // An error has nobody to go to; the daemon closes the context with the session.
  if (service_ != nullptr && context_.value != 0) (void)service_->Close(context_);
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Open(const Model& model, Device& device,
                                                         KvService* service,
                                                         const SequenceOptions& options,
                                                         std::span<const uint32_t> prompt,
                                                         uint32_t max_tokens) {
  auto out = std::unique_ptr<Sequence>(new Sequence(model, device, service, options));
  QUARRY_ASSIGN_OR_RETURN(ModelSpec spec, model.SpecFor(max_tokens, options.kv_dtype));
  out->shape_ = spec.shape;
  out->rope_ = spec.rope;
  out->max_tokens_ = max_tokens;
  QUARRY_RETURN_IF_ERROR(out->CheckTokens(prompt));
  LocalKv::Window window = options.window;
  window.everything |= service == nullptr;
  for (uint32_t l = 0; l < spec.shape.layers; ++l) {
    out->local_.emplace_back(&device, spec.shape, window);
  }
  if (service == nullptr) return out;
  OpenRequest request;
  request.spec = std::move(spec);
  request.tokens.assign(prompt.begin(), prompt.end());
  request.max_tokens = max_tokens;
  request.accepts = {NumericRecipe{}};
  QUARRY_ASSIGN_OR_RETURN(OpenResult opened, service->Open(request));
  out->context_ = opened.context;
  out->ids_.assign(prompt.begin(), prompt.end());
  out->tokens_ = out->reused_ = opened.reused_tokens;
  out->window_loaded_ = opened.reused_tokens == 0;
  return out;
}

absl::Status Sequence::CheckTokens(std::span<const uint32_t> tokens) const {
  const uint32_t vocab = model_.config().vocab;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= vocab) {
      return absl::InvalidArgumentError(absl::StrCat("token ", i, " has id ", tokens[i],
                                                     ", the vocabulary has ", vocab));
    }
  }
  if (tokens.size() > max_tokens_ - tokens_) {
    return absl::FailedPreconditionError(
        absl::StrCat(tokens.size(), " more tokens after ", tokens_,
                     " exceed the context's maximum of ", max_tokens_));
  }
  return absl::OkStatus();
}

uint64_t Sequence::local_kv_bytes() const {
  uint64_t bytes = 0;
  for (const LocalKv& kv : local_) bytes += kv.bytes();
  return bytes;
}

absl::StatusOr<std::vector<float>> Sequence::Extend(std::span<const uint32_t> tokens, Role role) {
  if (broken_) return absl::FailedPreconditionError("the sequence has failed before");
  if (tokens.empty()) return absl::InvalidArgumentError("no tokens to run");
  QUARRY_RETURN_IF_ERROR(CheckTokens(tokens));
  if (service_ != nullptr && tokens_ + tokens.size() > ids_.size()) {
    const std::span<const uint32_t> fresh = tokens.subspan(ids_.size() - tokens_);
    QUARRY_RETURN_IF_ERROR(service_->DeclareTokens(context_, fresh));
    ids_.insert(ids_.end(), fresh.begin(), fresh.end());
  }
  const bool by_rows = service_ != nullptr && tokens_ > 0 &&
                       tokens.size() <= options_.max_attend_rows;
  absl::StatusOr<std::vector<float>> logits = by_rows ? AttendRows(tokens, role) : Prefill(tokens);
  if (!logits.ok()) broken_ = true;
  return logits;
}

TokenRange Sequence::Visible(uint32_t position) const {
  const uint32_t window = model_.config().sliding_window;
  const uint32_t lo = window > 0 && position + 1 > window ? position + 1 - window : 0;
  return {lo, position + 1};
}

// ---- The layer's arithmetic, the same for prefill and rows.

absl::StatusOr<Sequence::Chunk> Sequence::Embed(std::span<const uint32_t> tokens) {
  const ModelConfig& c = model_.config();
  Chunk chunk;
  chunk.first = tokens_;
  chunk.rows = static_cast<uint32_t>(tokens.size());
  const size_t hidden = size_t{chunk.rows} * c.hidden * 4;
  const size_t heads = size_t{chunk.rows} * c.heads * c.head_dim * 4;
  const size_t kv = size_t{chunk.rows} * c.kv_heads * c.head_dim * 4;
  QUARRY_ASSIGN_OR_RETURN(chunk.x, device_.Allocate(hidden, "hidden states"));
  QUARRY_ASSIGN_OR_RETURN(chunk.norm, device_.Allocate(hidden, "normed states"));
  QUARRY_ASSIGN_OR_RETURN(chunk.q, device_.Allocate(heads, "queries"));
  QUARRY_ASSIGN_OR_RETURN(chunk.o, device_.Allocate(heads, "attention output"));
  QUARRY_ASSIGN_OR_RETURN(chunk.lse, device_.Allocate(size_t{chunk.rows} * c.heads * 4, "lse"));
  QUARRY_ASSIGN_OR_RETURN(chunk.k, device_.Allocate(kv, "keys"));
  QUARRY_ASSIGN_OR_RETURN(chunk.v, device_.Allocate(kv, "values"));
  device_.Embed(model_.embedding(), tokens, chunk.x.floats(), c.hidden);
  return chunk;
}

absl::Status Sequence::ProjectQkv(uint32_t layer, Chunk* chunk) {
  const ModelConfig& c = model_.config();
  const LayerWeights& w = model_.layers()[layer];
  const size_t q_width = size_t{c.heads} * c.head_dim, kv_width = size_t{c.kv_heads} * c.head_dim;
  device_.RmsNorm(chunk->x.floats(), w.attention_norm.floats(), c.norm_eps, chunk->norm.floats(),
                  chunk->rows, c.hidden);
  const auto project = [&](const DeviceBuffer& weight, DeviceBuffer& out, size_t width) {
    device_.MatMul(chunk->norm.floats(), weight.floats(), out.floats(), chunk->rows, c.hidden,
                   width, Device::Output::kOverwrite);
  };
  project(w.q, chunk->q, q_width);
  project(w.k, chunk->k, kv_width);
  project(w.v, chunk->v, kv_width);
  device_.Rope(chunk->q.floats(), chunk->rows, q_width, c.heads, c.head_dim, chunk->first,
               rope_.inv_freq, rope_.attention_scale);
  device_.Rope(chunk->k.floats(), chunk->rows, kv_width, c.kv_heads, c.head_dim, chunk->first,
               rope_.inv_freq, rope_.attention_scale);
  // Rounded before anybody attends them: local and remote attention see the same K and V.
  const size_t elements = size_t{chunk->rows} * kv_width;
  chunk->k_stored.resize(elements * DTypeBytes(shape_.dtype));
  chunk->v_stored.resize(elements * DTypeBytes(shape_.dtype));
  for (size_t i = 0; i < elements; ++i) {
    StoreFromFloat(chunk->k_stored.data(), i, shape_.dtype, chunk->k.floats()[i]);
    StoreFromFloat(chunk->v_stored.data(), i, shape_.dtype, chunk->v.floats()[i]);
  }
  return absl::OkStatus();
}

absl::Status Sequence::FinishLayer(uint32_t layer, Chunk* chunk) {
  const ModelConfig& c = model_.config();
  const LayerWeights& w = model_.layers()[layer];
  device_.MatMul(chunk->o.floats(), w.o.floats(), chunk->x.floats(), chunk->rows,
                 size_t{c.heads} * c.head_dim, c.hidden, Device::Output::kAccumulate);
  device_.RmsNorm(chunk->x.floats(), w.mlp_norm.floats(), c.norm_eps, chunk->norm.floats(),
                  chunk->rows, c.hidden);
  const size_t step = std::min<size_t>(kMlpRows, chunk->rows);
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer gate_up,
                          device_.Allocate(step * 2 * c.intermediate * 4, "MLP gate and up"));
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer act, device_.Allocate(step * c.intermediate * 4, "MLP"));
  for (size_t r = 0; r < chunk->rows; r += step) {
    const size_t rows = std::min(step, chunk->rows - r);
    device_.MatMul(chunk->norm.floats() + r * c.hidden, w.gate_up.floats(), gate_up.floats(), rows,
                   c.hidden, size_t{2} * c.intermediate, Device::Output::kOverwrite);
    device_.SwiGlu(gate_up.floats(), gate_up.floats() + c.intermediate, size_t{2} * c.intermediate,
                   act.floats(), rows, c.intermediate);
    device_.MatMul(act.floats(), w.down.floats(), chunk->x.floats() + r * c.hidden, rows,
                   c.intermediate, c.hidden, Device::Output::kAccumulate);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Sequence::Logits(const Chunk& chunk) {
  const ModelConfig& c = model_.config();
  std::vector<float> last(c.hidden), logits(c.vocab);
  device_.RmsNorm(chunk.x.floats() + size_t{chunk.rows - 1} * c.hidden, model_.final_norm(),
                  c.norm_eps, last.data(), 1, c.hidden);
  device_.MatMul(last.data(), model_.head(), logits.data(), 1, c.hidden, c.vocab,
                 Device::Output::kOverwrite);
  return logits;
}

// ---- Prefill: layer by layer over all new tokens, the layer's K/V in one buffer.

absl::StatusOr<std::vector<float>> Sequence::Prefill(std::span<const uint32_t> tokens) {
  QUARRY_ASSIGN_OR_RETURN(Chunk chunk, Embed(tokens));
  Appender appender(service_);
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    QUARRY_RETURN_IF_ERROR(ProjectQkv(l, &chunk));
    QUARRY_RETURN_IF_ERROR(PrefillLayer(l, &chunk, &appender));
    QUARRY_RETURN_IF_ERROR(FinishLayer(l, &chunk));
  }
  QUARRY_RETURN_IF_ERROR(appender.Finish());
  tokens_ += chunk.rows;
  window_loaded_ = true;
  for (LocalKv& kv : local_) kv.Slide(tokens_);
  return Logits(chunk);
}

// Everything the layer has so far: what is local, or what the service keeps of a prefix.
absl::StatusOr<TokenSpan> Sequence::LayerSoFar(uint32_t layer) {
  TokenSpan span(&device_, shape_);
  if (tokens_ == 0) return span;
  std::vector<std::byte> k(size_t{tokens_} * span.token_bytes()), v(k.size());
  QUARRY_RETURN_IF_ERROR(service_->Read(context_, layer, {0, tokens_}, k, v));
  cost_.bytes_moved += k.size() + v.size();
  QUARRY_RETURN_IF_ERROR(span.Append(0, tokens_, k.data(), v.data()));
  return span;
}

absl::Status Sequence::PrefillLayer(uint32_t layer, Chunk* chunk, Appender* appender) {
  const ModelConfig& c = model_.config();
  const std::byte* k = chunk->k_stored.data();
  const std::byte* v = chunk->v_stored.data();
  if (service_ == nullptr) {
    QUARRY_RETURN_IF_ERROR(local_[layer].Append(chunk->first, chunk->rows, k, v));
    AttendLocally(layer, chunk);
    return absl::OkStatus();
  }
  QUARRY_ASSIGN_OR_RETURN(TokenSpan all, LayerSoFar(layer));
  QUARRY_RETURN_IF_ERROR(all.Append(chunk->first, chunk->rows, k, v));
  std::vector<TokenRange> ranges;
  for (uint32_t r = 0; r < chunk->rows; ++r) ranges.push_back(Visible(chunk->first + r));
  const uint32_t group = shape_.group();
  for (uint32_t h = 0; h < c.kv_heads; ++h) {
    const DeviceKv part = all.Head(h, all.tokens());
    device_.Attend({std::span(&part, 1), c.head_dim, shape_.dtype, chunk->rows, group,
                    chunk->q.floats() + size_t{h} * group * c.head_dim,
                    size_t{c.heads} * c.head_dim, ranges,
                    chunk->o.floats() + size_t{h} * group * c.head_dim,
                    chunk->lse.floats() + size_t{h} * group, c.heads});
  }
  // The window is kept; the layer buffer goes with `all`.
  const uint32_t end = chunk->first + chunk->rows;
  LocalKv kept(&device_, shape_, options_.window);
  const TokenRange first{0, std::min(options_.window.first, end)};
  const TokenRange last{std::max(first.hi, end > options_.window.last ? end - options_.window.last : 0),
                        end};
  for (const TokenRange& range : {first, last}) {
    if (range.empty()) continue;
    std::vector<std::byte> window_k(range.size() * all.token_bytes()), window_v(window_k.size());
    all.CopyOut(range, window_k.data(), window_v.data());
    QUARRY_RETURN_IF_ERROR(kept.Append(range.lo, range.size(), window_k.data(), window_v.data()));
  }
  local_[layer] = std::move(kept);

  AppendRequest append;
  append.context = context_;
  append.layer = layer;
  append.kv_heads = c.kv_heads;
  append.range = {chunk->first, end};
  std::vector<float> samples;
  std::vector<uint32_t> positions;
  const size_t q_width = size_t{c.heads} * c.head_dim;
  const uint32_t wanted = std::min(options_.query_samples, chunk->rows);
  for (uint32_t i = 0; i < wanted; ++i) {
    const uint32_t row = static_cast<uint32_t>(uint64_t{i} * chunk->rows / wanted);
    positions.push_back(chunk->first + row);
    const float* q = chunk->q.floats() + row * q_width;
    samples.insert(samples.end(), q, q + q_width);
  }
  cost_.bytes_moved += chunk->k_stored.size() * 2 + samples.size() * 4;
  return appender->Start(append, std::move(chunk->k_stored), std::move(chunk->v_stored),
                         std::move(samples), std::move(positions));
}

void Sequence::AttendLocally(uint32_t layer, Chunk* chunk) {
  const ModelConfig& c = model_.config();
  const uint32_t group = shape_.group();
  std::vector<TokenRange> ranges;
  for (uint32_t r = 0; r < chunk->rows; ++r) ranges.push_back(Visible(chunk->first + r));
  for (uint32_t h = 0; h < c.kv_heads; ++h) {
    const std::vector<DeviceKv> parts = local_[layer].Head(h);
    device_.Attend({parts, c.head_dim, shape_.dtype, chunk->rows, group,
                    chunk->q.floats() + size_t{h} * group * c.head_dim,
                    size_t{c.heads} * c.head_dim, ranges,
                    chunk->o.floats() + size_t{h} * group * c.head_dim,
                    chunk->lse.floats() + size_t{h} * group, c.heads});
    for (const DeviceKv& part : parts) {
      for (const TokenRange& r : ranges) {
        cost_.tokens_local += uint64_t{Intersect(part.tokens, r).size()} * group;
      }
    }
  }
  for (const TokenRange& r : ranges) {
    cost_.head_steps += c.heads;
    cost_.tokens_in_reach += uint64_t{r.size()} * c.heads;
  }
}

// ---- Rows: the window here, the rest in the daemon, merged.

absl::Status Sequence::LoadWindow() {
  if (window_loaded_) return absl::OkStatus();
  const TokenRange first{0, std::min(options_.window.first, tokens_)};
  const TokenRange last{
      std::max(first.hi, tokens_ > options_.window.last ? tokens_ - options_.window.last : 0),
      tokens_};
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    for (const TokenRange& range : {first, last}) {
      if (range.empty()) continue;
      std::vector<std::byte> k(range.size() * shape_.kv_heads * shape_.vector_bytes()), v(k.size());
      QUARRY_RETURN_IF_ERROR(service_->Read(context_, l, range, k, v));
      QUARRY_RETURN_IF_ERROR(local_[l].Append(range.lo, range.size(), k.data(), v.data()));
      cost_.bytes_moved += k.size() + v.size();
    }
  }
  window_loaded_ = true;
  return absl::OkStatus();
}

// The budget of the next rows. K/V computed under one go to a context whose recipe says so.
absl::StatusOr<Budget> Sequence::SettleBudget(Role role) {
  if (role == Role::kPrompt) return Budget{};
  if (!settled_budget_) {
    settled_budget_ = options_.budget.budget;
    if (options_.budget.share > 0) {
      const TokenRange range = local_.front().Elsewhere();
      settled_budget_->kind = Budget::Kind::kFixedK;
      settled_budget_->k =
          std::max(1u, static_cast<uint32_t>(options_.budget.share * range.size()));
    }
  }
  const NumericRecipe wanted =
      RecipeOf(*settled_budget_, options_.window.first, options_.window.last);
  if (wanted != recipe_) QUARRY_RETURN_IF_ERROR(ForkContext(wanted));
  return *settled_budget_;
}

// Goes on in a fork of what is complete; the old context is closed.
absl::Status Sequence::ForkContext(const NumericRecipe& recipe) {
  QUARRY_ASSIGN_OR_RETURN(ContextId fork,
                          service_->Fork({context_, tokens_, max_tokens_, recipe}));
  const absl::Status closed = service_->Close(std::exchange(context_, fork));
  recipe_ = recipe;
  if (ids_.size() > tokens_) {
    QUARRY_RETURN_IF_ERROR(service_->DeclareTokens(context_, std::span(ids_).subspan(tokens_)));
  }
  return closed;
}

absl::StatusOr<std::vector<float>> Sequence::AttendRows(std::span<const uint32_t> tokens,
                                                        Role role) {
  QUARRY_RETURN_IF_ERROR(LoadWindow());
  QUARRY_ASSIGN_OR_RETURN(const Budget budget, SettleBudget(role));
  std::vector<float> logits;
  for (size_t at = 0; at < tokens.size(); at += options_.rows_per_message) {
    const std::span<const uint32_t> rows =
        tokens.subspan(at, std::min<size_t>(options_.rows_per_message, tokens.size() - at));
    const auto run = [&]() -> absl::Status {
      QUARRY_ASSIGN_OR_RETURN(Chunk chunk, Embed(rows));
      service_->Arm(true);
      absl::Status status;
      for (uint32_t l = 0; l < shape_.layers && status.ok(); ++l) {
        status.Update(ProjectQkv(l, &chunk));
        if (status.ok()) status.Update(AttendLayer(l, &chunk, budget));
        if (status.ok()) status.Update(FinishLayer(l, &chunk));
      }
      service_->Arm(false);
      QUARRY_RETURN_IF_ERROR(status);
      QUARRY_ASSIGN_OR_RETURN(logits, Logits(chunk));
      return absl::OkStatus();
    };
    absl::Status status = run();
    if (!status.ok() && !absl::IsUnavailable(status)) {
      QUARRY_RETURN_IF_ERROR(Recover());
      status = run();
    }
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("token ", tokens_, " is void: ",
                                                      status.message()));
    }
    tokens_ += static_cast<uint32_t>(rows.size());
    for (LocalKv& kv : local_) kv.Slide(tokens_);
  }
  return logits;
}

// Some layers may have stored the voided tokens, here and in the daemon: both go back to what is
// complete.
absl::Status Sequence::Recover() {
  for (LocalKv& kv : local_) kv.Truncate(tokens_);
  ++cost_.recoveries;
  return ForkContext(recipe_);
}

absl::Status Sequence::AttendLayer(uint32_t layer, Chunk* chunk, const Budget& budget) {
  const ModelConfig& c = model_.config();
  const size_t q_width = size_t{c.heads} * c.head_dim;
  const size_t kv_bytes = shape_.kv_heads * shape_.vector_bytes();
  const TokenRange elsewhere = local_[layer].Elsewhere();
  std::vector<float> o(chunk->rows * q_width), lse(size_t{chunk->rows} * c.heads);
  std::vector<AttendRow> rows(chunk->rows);
  std::vector<AttendAnswer> answers(chunk->rows);
  for (uint32_t r = 0; r < chunk->rows; ++r) {
    AttendRow& row = rows[r];
    row.context = context_;
    row.layer = layer;
    row.range = Intersect(elsewhere, Visible(chunk->first + r));
    row.heads = c.heads;
    row.budget = budget;
    row.q = chunk->q.floats() + r * q_width;
    row.has_token = true;
    row.token_position = chunk->first + r;
    row.k = chunk->k_stored.data() + r * kv_bytes;
    row.v = chunk->v_stored.data() + r * kv_bytes;
    answers[r].o = std::span(o).subspan(r * q_width, q_width);
    answers[r].lse = std::span(lse).subspan(size_t{r} * c.heads, c.heads);
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<PendingAttend> pending, service_->Attend(rows, answers));
  // The window, while the daemon works.
  absl::Status local = local_[layer].Append(chunk->first, chunk->rows, chunk->k_stored.data(),
                                            chunk->v_stored.data());
  if (local.ok()) AttendLocally(layer, chunk);
  QUARRY_RETURN_IF_ERROR(pending->Wait());
  QUARRY_RETURN_IF_ERROR(local);
  for (uint32_t r = 0; r < chunk->rows; ++r) {
    QUARRY_RETURN_IF_ERROR(answers[r].status);
    if (answers[r].covered != rows[r].range) {
      return absl::DataLossError(absl::StrCat(
          "layer ", layer, ": the daemon covered tokens [", answers[r].covered.lo, ", ",
          answers[r].covered.hi, ") of [", rows[r].range.lo, ", ", rows[r].range.hi, ")"));
    }
    cost_.tokens_daemon += answers[r].tokens_attended;
    cost_.bytes_touched += answers[r].bytes_touched;
  }
  cost_.bytes_moved += chunk->rows * (2 * q_width * 4 + 2 * kv_bytes + c.heads * 4);
  device_.Merge(chunk->o.floats(), chunk->lse.floats(), o.data(), lse.data(),
                size_t{chunk->rows} * c.heads, c.head_dim);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Fork() {
  if (broken_) return absl::FailedPreconditionError("the sequence has failed before");
  QUARRY_RETURN_IF_ERROR(service_ != nullptr ? LoadWindow() : absl::OkStatus());
  auto out = std::unique_ptr<Sequence>(new Sequence(model_, device_, service_, options_));
  out->shape_ = shape_;
  out->rope_ = rope_;
  out->max_tokens_ = max_tokens_;
  out->recipe_ = recipe_;
  out->settled_budget_ = settled_budget_;
  out->tokens_ = tokens_;
  out->reused_ = reused_;
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
