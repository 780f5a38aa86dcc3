#include "daemon/context.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/finite.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// One attend's queries of so many are kept.
constexpr uint32_t kSampleEvery = 16;

std::string RangeText(TokenRange range) { return absl::StrCat("[", range.lo, ", ", range.hi, ")"); }

absl::Status ClosedError(ContextId id) {
  return absl::NotFoundError(absl::StrCat("context ", id.value, " is closed"));
}

// Null: none of its runs is indexed, or it is too short for one.
std::shared_ptr<QuerySamples> SamplesOf(const ContextServices& services,
                                        const ContextParams& params,
                                        std::shared_ptr<QuerySamples> of_parent) {
  if (of_parent != nullptr || !services.indexer->enabled()) return of_parent;
  if (services.runs->grid().RunsIn(params.max_tokens) == 0) return nullptr;
  return services.indexer->MakeSamples(params.spec.shape);
}

}  // namespace

Context::Context(const ContextServices& services, ContextParams params, ContextStart start)
    : services_(services),
      params_(std::move(params)),
      placed_(start.table.placed),
      copied_blocks_(std::move(start.copied_blocks)),
      frontier_(size_t{shape().layers} * shape().kv_heads),
      samples_(SamplesOf(services, params_, std::move(start.samples))),
      attends_(samples_ == nullptr ? 0 : frontier_.size()),
      table_(std::make_shared<const BlockTable>(std::move(start.table))),
      token_ids_(std::move(start.token_ids)),
      claimed_(frontier_.size()),
      full_strips_(table_->blocks.size()),
      settled_runs_(shape().layers) {
  const uint32_t next = BehindPlaced(start.tokens);
  for (auto& frontier : frontier_) frontier.store(next, std::memory_order_relaxed);
}

absl::Status Context::Append(const AppendRequest& r) {
  const KvInput input{r.layer, r.first_kv_head, r.kv_heads, r.range, r.k, r.v, r.new_token_ids};
  QUARRY_RETURN_IF_ERROR(CheckInput(input));
  QUARRY_RETURN_IF_ERROR(CheckSamples(r));
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table,
                          Claim(input, Caller::kAppend));
  QUARRY_RETURN_IF_ERROR(TakeIds(input, CopyIn(input, *table)));
  // Before the frontier moves: runs that end here are learned from with these queries.
  const bool worth = KeepSamples(r);
  MoveFrontier(input);
  if (worth) services_.background->Enqueue(shared_from_this());
  return absl::OkStatus();
}

bool Context::KeepSamples(const AppendRequest& r) {
  if (samples_ == nullptr) return false;
  const size_t floats = size_t{r.kv_heads} * shape().group() * shape().head_dim;
  bool worth = false;
  for (size_t i = 0; i < r.query_positions.size(); ++i) {
    worth |= samples_->Add(r.layer, r.first_kv_head, r.kv_heads, r.query_samples + i * floats);
  }
  return worth;
}

void Context::SampleQueries(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads,
                            const float* q) {
  if (samples_ == nullptr) return;
  std::atomic<uint32_t>& attends = attends_[size_t{layer} * shape().kv_heads + first_kv_head];
  if (attends.fetch_add(1, std::memory_order_relaxed) % kSampleEvery != 0) return;
  const bool worth = samples_->TryAdd(layer, first_kv_head, kv_heads, q);
  // Also what another fork's queries have renewed is for this context's runs.
  if (worth || samples_->renewal() != considered_renewal_.load(std::memory_order_relaxed)) {
    services_.background->Enqueue(shared_from_this());
  }
}

absl::Status Context::AppendToken(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads,
                                  uint32_t position, const void* k, const void* v) {
  // A position at the end of the number range must not wrap to an empty range.
  if (position >= params_.max_tokens) {
    return absl::FailedPreconditionError(
        absl::StrCat("context ", params_.id.value, ": token position ", position,
                     " is not below max_tokens ", params_.max_tokens));
  }
  const KvInput input{layer, first_kv_head, kv_heads, {position, position + 1}, k, v, {}};
  QUARRY_RETURN_IF_ERROR(CheckInput(input));
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table,
                          Claim(input, Caller::kAttend));
  QUARRY_RETURN_IF_ERROR(TakeIds(input, CopyIn(input, *table)));
  MoveFrontier(input);
  return absl::OkStatus();
}

absl::Status Context::CheckInput(const KvInput& input) const {
  const KvShape& s = shape();
  if (input.layer >= s.layers) {
    return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value, ": layer ",
                                                   input.layer, " of ", s.layers, " layers"));
  }
  if (input.kv_heads == 0 || input.first_kv_head >= s.kv_heads ||
      input.kv_heads > s.kv_heads - input.first_kv_head) {
    return absl::InvalidArgumentError(absl::StrCat(
        "context ", params_.id.value, ": KV heads [", input.first_kv_head, ", ",
        uint64_t{input.first_kv_head} + input.kv_heads, ") of ", s.kv_heads, " KV heads"));
  }
  if (input.range.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value, ": tokens ",
                                                   RangeText(input.range), " are none"));
  }
  if (input.range.hi > params_.max_tokens) {
    return absl::FailedPreconditionError(absl::StrCat("context ", params_.id.value, ": tokens ",
                                                      RangeText(input.range), " pass max_tokens ",
                                                      params_.max_tokens));
  }
  for (const PlacedStretch& stretch : placed_) {
    if (Intersect(stretch.tokens, input.range).empty()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("context ", params_.id.value, ": tokens ", RangeText(input.range), " meet ",
                     RangeText(stretch.tokens), ", which are reused from another position"));
  }
  if (input.k == nullptr || input.v == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("context ", params_.id.value, ": K or V is missing"));
  }
  return absl::OkStatus();
}

absl::Status Context::CheckSamples(const AppendRequest& r) const {
  const size_t floats = size_t{r.kv_heads} * shape().group() * shape().head_dim;
  for (size_t i = 0; i < r.query_positions.size(); ++i) {
    const uint32_t position = r.query_positions[i];
    const auto refuse = [&](const std::string& what) {
      return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value,
                                                     ": query sample ", i, " at position ",
                                                     position, " of layer ", r.layer, " ", what));
    };
    if (position >= params_.max_tokens) {
      return refuse(absl::StrCat("is not below max_tokens ", params_.max_tokens));
    }
    if (!AllFinite(DType::kFp32, r.query_samples + i * floats, floats)) {
      return refuse("has NaN or infinity");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const BlockTable>> Context::Claim(const KvInput& input,
                                                                 Caller caller) {
  absl::MutexLock lock(&mutex_);
  if (retired_) return ClosedError(params_.id);
  if (sealed_) {
    return absl::FailedPreconditionError(absl::StrCat("context ", params_.id.value, " is sealed"));
  }
  const size_t first = size_t{input.layer} * shape().kv_heads + input.first_kv_head;
  for (size_t i = 0; i < input.kv_heads; ++i) {
    const uint32_t next = frontier_[first + i].load(std::memory_order_relaxed);
    if (claimed_[first + i]) {
      return absl::FailedPreconditionError(
          absl::StrCat("context ", params_.id.value, ": layer ", input.layer, ", KV head ",
                       input.first_kv_head + i, " is being appended to by another call"));
    }
    if (next == input.range.lo) continue;
    const std::string message = absl::StrCat(
        "context ", params_.id.value, ": tokens ", RangeText(input.range), " of layer ",
        input.layer, ", KV head ", input.first_kv_head + i, ": the next token is ", next);
    return caller == Caller::kAttend ? absl::FailedPreconditionError(message)
                                     : absl::InvalidArgumentError(message);
  }
  std::span<const uint32_t> fresh;
  QUARRY_RETURN_IF_ERROR(CheckIds(input, &fresh));  // before the copy, to refuse early
  for (size_t i = 0; i < input.kv_heads; ++i) claimed_[first + i] = true;
  return table_;
}

absl::Status Context::CheckIds(const KvInput& input, std::span<const uint32_t>* fresh) const {
  *fresh = {};
  if (input.ids.empty()) return absl::OkStatus();
  const auto known = static_cast<uint32_t>(token_ids_.size());
  uint32_t first;  // token of ids[0]
  if (input.ids.size() == input.range.size()) {
    first = input.range.lo;
  } else if (known < input.range.hi && input.ids.size() == input.range.hi - known) {
    first = known;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("context ", params_.id.value, ": ", input.ids.size(), " token ids for tokens ",
                     RangeText(input.range), " with ", known, " ids known"));
  }
  if (first > known) {
    return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value, ": ids of tokens ",
                                                   RangeText(input.range),
                                                   " leave a gap after the ", known, " known"));
  }
  for (uint32_t i = 0; i < input.ids.size() && first + i < known; ++i) {
    if (token_ids_[first + i] == input.ids[i]) continue;
    return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value, ": token ",
                                                   first + i, " has id ", token_ids_[first + i],
                                                   ", not ", input.ids[i]));
  }
  if (first + input.ids.size() > known) *fresh = input.ids.subspan(known - first);
  return absl::OkStatus();
}

absl::Status Context::CopyIn(const KvInput& input, const BlockTable& table) const {
  const KvShape& s = shape();
  const size_t vector_bytes = s.vector_bytes();
  const size_t token_bytes = vector_bytes * input.kv_heads;
  for (uint32_t lo = input.range.lo; lo < input.range.hi;) {
    const uint32_t block = lo / kBlockTokens;
    const uint32_t hi = std::min(input.range.hi, (block + 1) * kBlockTokens);
    std::byte* const data = table.blocks[block]->writable();
    for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
      const auto* const source =
          static_cast<const std::byte*>(part == KvPart::kKey ? input.k : input.v) +
          size_t{lo - input.range.lo} * token_bytes;
      for (uint32_t h = 0; h < input.kv_heads; ++h) {
        std::byte* const strip = data + s.strip_offset(input.layer, part, input.first_kv_head + h) +
                                 size_t{lo % kBlockTokens} * vector_bytes;
        for (uint32_t t = 0; t < hi - lo; ++t) {
          std::memcpy(strip + t * vector_bytes, source + t * token_bytes + h * vector_bytes,
                      vector_bytes);
        }
        // The copy is checked, not the source: a client may change that at any time.
        if (AllFinite(s.dtype, strip, size_t{hi - lo} * s.head_dim)) continue;
        uint32_t bad = 0;
        while (AllFinite(s.dtype, strip + bad * vector_bytes, s.head_dim)) ++bad;
        return absl::InvalidArgumentError(
            absl::StrCat("context ", params_.id.value, ": NaN or infinity in ",
                         part == KvPart::kKey ? "K" : "V", " of layer ", input.layer, ", token ",
                         lo + bad, ", KV head ", input.first_kv_head + h));
      }
    }
    lo = hi;
  }
  return absl::OkStatus();
}

absl::Status Context::TakeIds(const KvInput& input, absl::Status outcome) {
  if (outcome.ok() && input.ids.empty()) return outcome;  // as at each layer of a decode step
  absl::MutexLock lock(&mutex_);
  std::span<const uint32_t> fresh;
  if (outcome.ok()) outcome = CheckIds(input, &fresh);
  if (outcome.ok()) {
    token_ids_.insert(token_ids_.end(), fresh.begin(), fresh.end());
  } else {
    EndClaim(input);
  }
  return outcome;
}

void Context::EndClaim(const KvInput& input) {
  const auto first = claimed_.begin() + static_cast<ptrdiff_t>(input.layer) * shape().kv_heads +
                     input.first_kv_head;
  std::fill_n(first, input.kv_heads, false);
}

void Context::MoveFrontier(const KvInput& input) {
  bool maintain = false;
  {
    absl::MutexLock lock(&mutex_);
    EndClaim(input);
    // Release: who sees the new frontier sees the bytes below it.
    const uint32_t next = BehindPlaced(input.range.hi);
    for (size_t i = 0; i < input.kv_heads; ++i) {
      Frontier(input.layer, input.first_kv_head + i).store(next, std::memory_order_release);
    }
    maintain = CountFullBlocks(input);
    maintain |= SettleBefore(input.layer);
  }
  const uint64_t tokens = input.range.size();
  services_.counters->append_tokens.fetch_add(tokens, std::memory_order_relaxed);
  services_.counters->append_bytes.fetch_add(tokens * input.kv_heads * 2 * shape().vector_bytes(),
                                             std::memory_order_relaxed);
  if (maintain) services_.background->Enqueue(shared_from_this());
}

uint32_t Context::BehindPlaced(uint32_t token) const {
  for (const PlacedStretch& stretch : placed_) {
    if (stretch.tokens.lo == token) token = stretch.tokens.hi;
  }
  return token;
}

bool Context::CountFullBlocks(const KvInput& input) {
  bool any = false;
  const uint32_t strips = shape().layers * shape().kv_heads;
  for (uint32_t b = input.range.lo / kBlockTokens; (b + 1) * kBlockTokens <= input.range.hi; ++b) {
    full_strips_[b] += input.kv_heads;
    any |= full_strips_[b] == strips;
  }
  return any;
}

absl::Status Context::DeclareTokens(std::span<const uint32_t> ids) {
  {
    absl::MutexLock lock(&mutex_);
    const uint64_t known = token_ids_.size();
    if (known + ids.size() > params_.max_tokens) {
      return absl::FailedPreconditionError(
          absl::StrCat("context ", params_.id.value, ": ", ids.size(), " token ids after ", known,
                       " known pass max_tokens ", params_.max_tokens));
    }
    token_ids_.insert(token_ids_.end(), ids.begin(), ids.end());
  }
  // Blocks that were full before their ids were known become publishable.
  services_.background->Enqueue(shared_from_this());
  return absl::OkStatus();
}

void Context::Seal() {
  {
    absl::MutexLock lock(&mutex_);
    sealed_ = true;
  }
  Maintain();
}

uint32_t Context::AvailableTokens(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads) const {
  uint32_t tokens = params_.max_tokens;
  for (uint32_t h = first_kv_head; h < first_kv_head + kv_heads; ++h) {
    tokens = std::min(tokens, Frontier(layer, h).load(std::memory_order_acquire));
  }
  return tokens;
}

uint32_t Context::CompleteTokens() const {
  uint32_t tokens = params_.max_tokens;
  for (const auto& frontier : frontier_) {
    tokens = std::min(tokens, frontier.load(std::memory_order_acquire));
  }
  return tokens;
}

absl::StatusOr<std::shared_ptr<const BlockTable>> Context::Table() const {
  absl::MutexLock lock(&mutex_);
  if (retired_) return ClosedError(params_.id);
  return table_;
}

std::shared_ptr<const BlockTable> Context::TableOrRemains() const {
  absl::MutexLock lock(&mutex_);
  return table_;
}

void Context::Retire() {
  auto remains = std::make_shared<BlockTable>();
  std::shared_ptr<const BlockTable> whole;  // ends outside the lock: it may be the last owner
  absl::MutexLock lock(&mutex_);
  if (std::exchange(retired_, true)) return;
  // Full blocks that wait to be published keep their predecessors, whose ids they need.
  const auto end = table_->blocks.begin() + CompleteTokens() / kBlockTokens;
  if (!std::all_of(table_->blocks.begin(), end, [](const auto& b) { return b->published(); })) {
    remains->blocks.assign(table_->blocks.begin(), end);
    remains->placed = placed_;
  }
  whole = std::exchange(table_, std::move(remains));
}

std::vector<uint32_t> Context::TokenIds(uint32_t limit) const {
  absl::MutexLock lock(&mutex_);
  return {token_ids_.begin(), token_ids_.begin() + std::min<size_t>(limit, token_ids_.size())};
}

ContextInfo Context::Info() const {
  ContextInfo info;
  info.context = params_.id;
  info.model = params_.spec.name;
  info.shape = shape();
  info.tokens = CompleteTokens();
  info.max_tokens = params_.max_tokens;
  for (const PlacedStretch& stretch : placed_) info.shifted_tokens += stretch.tokens.size();
  std::shared_ptr<const BlockTable> table;
  {
    absl::MutexLock lock(&mutex_);
    table = table_;
    info.known_tokens = static_cast<uint32_t>(token_ids_.size());
    info.sealed = sealed_;
  }
  for (const auto& block : table->blocks) {
    const bool published = block->published();
    info.shared_tokens += published ? kBlockTokens : 0;
    (published ? info.shared_bytes : info.private_bytes) += shape().block_bytes();
  }
  return info;
}

}  // namespace quarry
