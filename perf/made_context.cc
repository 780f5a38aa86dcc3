#include "perf/made_context.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "perf/bench_daemon.h"
#include "perf/retrieval/synthetic_trace.h"
#include "perf/retrieval/truth.h"
#include "perf/statistics.h"
#include "proto/status_macros.h"

namespace quarry::perf {
namespace {

constexpr uint32_t kQueries = 64;  // that decoding asks in turn
constexpr uint32_t kAppendTokens = 1024;
constexpr uint32_t kSpareTokens = 2;  // for SendSamples

// [kv_head][token][head_dim] to [token][kv_head][head_dim].
std::vector<std::byte> ByToken(const std::vector<std::byte>& heads, const Trace& trace) {
  std::vector<std::byte> rows(heads.size());
  const size_t vector = heads.size() / trace.kv_heads / trace.tokens;
  for (size_t h = 0; h < trace.kv_heads; ++h) {
    for (size_t t = 0; t < trace.tokens; ++t) {
      std::memcpy(rows.data() + (t * trace.kv_heads + h) * vector,
                  heads.data() + (h * trace.tokens + t) * vector, vector);
    }
  }
  return rows;
}

}  // namespace

absl::StatusOr<MadeModel> MadeModel::Make(const Options& o) {
  constexpr Window kWindow;
  if (o.families.empty() || o.layers == 0 || o.prompt_tokens <= kWindow.first + kWindow.last) {
    return absl::InvalidArgumentError(absl::StrCat(
        o.families.size(), " families, ", o.layers, " layers, a prompt of ", o.prompt_tokens,
        " tokens: wanted are at least one, one and ", kWindow.first + kWindow.last + 1));
  }
  MadeModel model;
  model.spec_.name = "made";
  model.spec_.shape = {.layers = o.layers,
                       .heads = o.kv_heads * o.group,
                       .kv_heads = o.kv_heads,
                       .head_dim = o.head_dim,
                       .dtype = DType::kBf16};
  model.spec_.weights.bytes.fill(0x42);
  model.prompt_tokens_ = o.prompt_tokens;
  model.samples_ = o.query_samples;
  for (const std::string& family :
       std::span(o.families).first(std::min<size_t>(o.families.size(), o.layers))) {
    QUARRY_ASSIGN_OR_RETURN(const Trace trace,
                            SyntheticTrace(family, {.tokens = o.prompt_tokens + kDecoded,
                                                    .kv_heads = o.kv_heads,
                                                    .group = o.group,
                                                    .head_dim = o.head_dim,
                                                    .train_queries = o.query_samples,
                                                    .queries = kQueries,
                                                    .seed = o.seed}));
    model.layers_.push_back(LayerOf(trace, o.prompt_tokens));
  }
  return model;
}

MadeModel::Layer MadeModel::LayerOf(const Trace& trace, uint32_t prompt_tokens) {
  Layer layer{ByToken(trace.k, trace), ByToken(trace.v, trace), {}, trace.q, {}};
  const auto samples = static_cast<uint32_t>(trace.q_train_pos.size());
  const size_t row = size_t{trace.heads} * trace.head_dim;
  for (uint32_t i = 0; i < samples; ++i) {
    // Every second one, then the rest, so that half of them are of the whole prompt too.
    const uint32_t at = i < (samples + 1) / 2 ? 2 * i : 2 * (i - (samples + 1) / 2) + 1;
    const auto q = trace.q_train.begin() + static_cast<ptrdiff_t>(at * row);
    layer.samples.insert(layer.samples.end(), q, q + static_cast<ptrdiff_t>(row));
    layer.positions.push_back(std::min(trace.q_train_pos[at], prompt_tokens - 1));
  }
  return layer;
}

MadeContext::MadeContext(Client* client, const MadeModel& model, const Options& options)
    : client_(client),
      model_(model),
      options_(options),
      o_(size_t{model.shape().heads} * model.shape().head_dim),
      lse_(model.shape().heads) {
  OpenRequest open;
  open.spec = model_.spec();
  open.max_tokens = model_.prompt_tokens() + kSpareTokens;
  open.accepts = {NumericRecipe{}};
  if (options_.ids == Ids::kAtOpen) {
    open.tokens.resize(model_.prompt_tokens());
    std::iota(open.tokens.begin(), open.tokens.end(), options_.first_id);
    declared_ = true;
  }
  const OpenResult opened = ValueOrDie(client_->Open(open), "open");
  prompt_ = opened.context;
  if (opened.reused_tokens > 0) {
    Die(absl::FailedPreconditionError(absl::StrCat(opened.reused_tokens, " tokens are cached")),
        "open");
  }
  tokens_ = model_.prompt_tokens();
  for (uint32_t layer = 0; layer < model_.shape().layers; ++layer) {
    absl::SleepFor(absl::Seconds(options_.layer_seconds));
    for (uint32_t lo = 0; lo < tokens_; lo += kAppendTokens) {
      const TokenRange range{lo, std::min(lo + kAppendTokens, tokens_)};
      std::vector<uint32_t> samples;
      for (uint32_t i = 0; i < options_.samples; ++i) {
        const uint32_t position = model_.SamplePosition(i);
        if (range.lo <= position && position < range.hi) samples.push_back(i);
      }
      Append(layer, range, samples);
    }
  }
}

MadeContext::~MadeContext() {
  if (fork_ != ContextId{}) Die(client_->Close(fork_), "close");
  Die(client_->Close(prompt_), "close");
}

void MadeContext::Append(uint32_t layer, TokenRange range, std::span<const uint32_t> samples) {
  std::vector<uint32_t> positions;
  std::vector<float> queries;
  for (uint32_t i : samples) {
    const std::span<const float> q = model_.Sample(layer, i);
    positions.push_back(model_.SamplePosition(i));
    queries.insert(queries.end(), q.begin(), q.end());
  }
  AppendRequest append;
  append.context = prompt_;
  append.layer = layer;
  append.kv_heads = model_.shape().kv_heads;
  append.range = range;
  append.k = model_.Keys(layer, range.lo);
  append.v = model_.Values(layer, range.lo);
  append.query_positions = positions;
  append.query_samples = queries.data();
  Die(client_->Append(append), "append");
}

void MadeContext::DeclarePrompt() {
  std::vector<uint32_t> ids(model_.prompt_tokens());
  std::iota(ids.begin(), ids.end(), options_.first_id);
  Die(client_->DeclareTokens(prompt_, ids), "declare");
  declared_ = true;
  decoded_ = MadeModel::kDecoded;  // a fork knows what ids there were
}

void MadeContext::SendSamples(uint32_t lo, uint32_t hi) {
  std::vector<uint32_t> samples(hi - lo);
  std::iota(samples.begin(), samples.end(), lo);
  const TokenRange token{tokens_, tokens_ + 1};
  for (uint32_t layer = 0; layer < model_.shape().layers; ++layer) Append(layer, token, samples);
  tokens_ = token.hi;
}

void MadeContext::BeginFork() {
  if (fork_ != ContextId{}) Die(client_->Close(fork_), "close");
  fork_ = ValueOrDie(client_->Fork({prompt_, model_.prompt_tokens(),
                                    model_.prompt_tokens() + MadeModel::kDecoded, NumericRecipe{}}),
                     "fork");
  decoded_ = 0;
}

double MadeContext::Step() {
  if (decoded_ == MadeModel::kDecoded) BeginFork();
  const uint32_t position = model_.prompt_tokens() + decoded_;
  AttendRow row;
  row.context = fork_;
  row.range = Window{}.Rest(position);
  row.heads = model_.shape().heads;
  row.budget.kind = Budget::Kind::kError;
  row.budget.error = options_.error;
  row.has_token = true;
  row.token_position = position;
  row.merged = true;
  AttendAnswer answer;
  answer.o = o_;
  answer.lse = lse_;
  const uint32_t id = options_.first_id + position;
  const double us = Microseconds([&] {
    if (declared_) Die(client_->DeclareTokens(fork_, {&id, 1}), "declare");
    client_->Arm();
    for (row.layer = 0; row.layer < model_.shape().layers; ++row.layer) {
      row.q = model_.Query(row.layer, static_cast<uint32_t>(steps_));
      row.k = model_.Keys(row.layer, position);
      row.v = model_.Values(row.layer, position);
      Attend(client_, {&row, 1}, {&answer, 1});
    }
    client_->Disarm();
  });
  ++decoded_;
  ++steps_;
  return us;
}

}  // namespace quarry::perf
