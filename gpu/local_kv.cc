#include "gpu/local_kv.h"

#include <algorithm>

#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {

absl::StatusOr<TokenSpan::Part> TokenSpan::Allocate(size_t bytes, std::string_view what) const {
  Part part;
  if (memory_ == KvMemory::kDevice) {
    QUARRY_ASSIGN_OR_RETURN(part.on_device, device_->Allocate(bytes, what));
  } else {
    QUARRY_ASSIGN_OR_RETURN(part.on_host, device_->AllocateHost(bytes, what));
  }
  return part;
}

absl::Status TokenSpan::Grow(uint32_t capacity) {
  const size_t vector = shape_.vector_bytes();
  const size_t stride = size_t{capacity} * vector;
  // Both or neither: a refusal leaves the span as it was.
  QUARRY_ASSIGN_OR_RETURN(Part k, Allocate(stride * shape_.kv_heads, "local K"));
  QUARRY_ASSIGN_OR_RETURN(Part v, Allocate(stride * shape_.kv_heads, "local V"));
  for (const auto& [to, from] : {std::pair{&k, &k_}, {&v, &v_}}) {
    if (!tokens_.empty()) {
      device_->Copy({to->raw(), stride, from->raw() + at(tokens_.lo), head_stride(),
                     tokens_.size() * vector, shape_.kv_heads});
    }
    *from = std::move(*to);
  }
  capacity_ = capacity;
  start_ = 0;
  return absl::OkStatus();
}

absl::Status TokenSpan::Compact() {
  const size_t bytes = tokens_.size() * shape_.vector_bytes();  // of a head
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer between,
                          device_->Allocate(bytes * shape_.kv_heads, "local K and V on the move"));
  for (const Part* part : {&k_, &v_}) {
    device_->Copy({between.raw(), bytes, part->raw() + at(tokens_.lo), head_stride(), bytes,
                   shape_.kv_heads});
    device_->Copy({part->raw(), head_stride(), between.raw(), bytes, bytes, shape_.kv_heads});
  }
  start_ = 0;
  return absl::OkStatus();
}

absl::Status TokenSpan::Reserve(uint32_t tokens) {
  const uint32_t held = tokens_.size();
  if (start_ + held + tokens <= capacity_) return absl::OkStatus();
  // A window slides in place: where most of the room lies free before it, it moves to the front.
  // Else an eighth more than is needed keeps the copying of single tokens in proportion.
  const uint64_t needed = uint64_t{held} + tokens;
  if (needed + std::max<uint64_t>(64, held / 8) <= capacity_) return Compact();
  return Grow(static_cast<uint32_t>(held == 0 ? needed : needed + std::max(64u, held / 8)));
}

absl::Status TokenSpan::Append(uint32_t first, uint32_t count, const void* k, const void* v) {
  QUARRY_RETURN_IF_ERROR(Extend(first, count));
  device_->StoreKv(StoreOf(first, count, k, v));
  return absl::OkStatus();
}

absl::Status TokenSpan::Extend(uint32_t first, uint32_t count) {
  if (tokens_.empty()) {
    Clear();
    tokens_ = {first, first};
  }
  QUARRY_CHECK(first == tokens_.hi);
  QUARRY_RETURN_IF_ERROR(Reserve(count));
  tokens_.hi += count;
  return absl::OkStatus();
}

DeviceKvStore TokenSpan::StoreOf(uint32_t first, uint32_t count, const void* k,
                                 const void* v) const {
  DeviceKvStore store;
  store.k = k;
  store.v = v;
  store.to_k = k_.raw();
  store.to_v = v_.raw();
  store.head_stride = head_stride();
  store.vector_bytes = shape_.vector_bytes();
  store.rows = count;
  store.kv_heads = shape_.kv_heads;
  store.slot = start_ + first - tokens_.lo;
  return store;
}

absl::Status TokenSpan::AppendFrom(const TokenSpan& other, TokenRange range) {
  QUARRY_CHECK(Intersect(range, other.tokens_) == range);
  if (range.empty()) return absl::OkStatus();
  if (tokens_.empty()) {
    Clear();
    tokens_ = {range.lo, range.lo};
  }
  QUARRY_CHECK(range.lo == tokens_.hi);
  QUARRY_RETURN_IF_ERROR(Reserve(range.size()));
  const size_t bytes = range.size() * shape_.vector_bytes();
  device_->Copy({k_.raw() + at(range.lo), head_stride(), other.k_.raw() + other.at(range.lo),
                 other.head_stride(), bytes, shape_.kv_heads});
  device_->Copy({v_.raw() + at(range.lo), head_stride(), other.v_.raw() + other.at(range.lo),
                 other.head_stride(), bytes, shape_.kv_heads});
  tokens_.hi = range.hi;
  return absl::OkStatus();
}

void TokenSpan::DropBefore(uint32_t token) {
  token = std::clamp(token, tokens_.lo, tokens_.hi);
  start_ += token - tokens_.lo;
  tokens_.lo = token;
}

void TokenSpan::Truncate(uint32_t hi) { tokens_.hi = std::clamp(hi, tokens_.lo, tokens_.hi); }

void TokenSpan::Clear() {
  tokens_ = {};
  start_ = 0;
}

DeviceKv TokenSpan::View() const {
  if (tokens_.empty()) return {};
  return {k_.raw() + at(tokens_.lo), v_.raw() + at(tokens_.lo), head_stride(), tokens_};
}

std::pair<TokenRange, TokenRange> LocalKv::Window::Kept(uint32_t tokens) const {
  if (everything) return {{}, {0, tokens}};
  const TokenRange head{0, std::min(first, tokens)};
  return {head, {std::max(head.hi, tokens > last ? tokens - last : 0), tokens}};
}

absl::Status LocalKv::Reserve(uint32_t tokens) {
  if (window_.everything) return last_.Reserve(tokens);
  return first_.Reserve(std::min(tokens, window_.first));
}

absl::Status LocalKv::Append(uint32_t first, uint32_t count, const void* k, const void* v) {
  const uint32_t head =
      window_.everything || first >= window_.first ? 0 : std::min(count, window_.first - first);
  if (head > 0) QUARRY_RETURN_IF_ERROR(first_.Append(first, head, k, v));
  if (head == count) return absl::OkStatus();
  const size_t skip = size_t{head} * last_.token_bytes();
  return last_.Append(first + head, count - head, static_cast<const std::byte*>(k) + skip,
                      static_cast<const std::byte*>(v) + skip);
}

absl::Status LocalKv::Extend(uint32_t first, uint32_t count) {
  QUARRY_CHECK(window_.everything || first >= window_.first);
  return last_.Extend(first, count);
}

std::vector<DeviceKv> LocalKv::PlacedParts() const {
  std::vector<DeviceKv> out;
  if (!first_.tokens().empty()) out.push_back(first_.View());
  out.push_back(last_.FromStart());
  return out;
}

absl::Status LocalKv::Assign(const TokenSpan& all, uint32_t tokens) {
  const auto [first, last] = window_.Kept(tokens);
  first_.Clear();
  last_.Clear();
  QUARRY_RETURN_IF_ERROR(first_.AppendFrom(all, first));
  return last_.AppendFrom(all, last);
}

void LocalKv::Slide(uint32_t tokens) { last_.DropBefore(window_.Kept(tokens).second.lo); }

void LocalKv::Truncate(uint32_t tokens) {
  first_.Truncate(tokens);
  last_.Truncate(tokens);
}

absl::StatusOr<LocalKv> LocalKv::Clone() const {
  LocalKv out = LocalKv(window_, first_.Empty(), last_.Empty());
  QUARRY_RETURN_IF_ERROR(out.first_.AppendFrom(first_, first_.tokens()));
  QUARRY_RETURN_IF_ERROR(out.last_.AppendFrom(last_, last_.tokens()));
  return out;
}

TokenRange LocalKv::Elsewhere(uint32_t tokens) const {
  const TokenRange gap{first_.tokens().hi, last_.tokens().empty() ? tokens : last_.tokens().lo};
  return gap.empty() ? TokenRange{} : gap;
}

std::vector<DeviceKv> LocalKv::Parts() const {
  std::vector<DeviceKv> out;
  for (const TokenSpan* span : {&first_, &last_}) {
    if (!span->tokens().empty()) out.push_back(span->View());
  }
  return out;
}

}  // namespace quarry
