#include "gpu/local_kv.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {

uint64_t TokenSpan::bytes() const { return k_.bytes() + v_.bytes(); }

absl::Status TokenSpan::Reserve(uint32_t tokens) {
  const uint32_t held = tokens_.size();
  if (start_ + held + tokens <= capacity_) return absl::OkStatus();
  // Room is made by moving to the front where half of the buffer is free, else by growing.
  const uint32_t wanted =
      2 * (held + tokens) <= capacity_ ? capacity_ : std::max(64u, held + tokens + held / 2);
  const size_t vector = shape_.vector_bytes();
  const size_t stride = size_t{wanted} * vector;
  for (DeviceBuffer* part : {&k_, &v_}) {
    QUARRY_ASSIGN_OR_RETURN(DeviceBuffer next,
                            device_->Allocate(stride * shape_.kv_heads, "local K/V"));
    for (uint32_t h = 0; h < shape_.kv_heads && held > 0; ++h) {
      std::memcpy(next.raw() + h * stride, part->raw() + at(h, tokens_.lo), held * vector);
    }
    *part = std::move(next);
  }
  capacity_ = wanted;
  start_ = 0;
  return absl::OkStatus();
}

absl::Status TokenSpan::Append(uint32_t first, uint32_t count, const std::byte* k,
                               const std::byte* v) {
  if (tokens_.empty()) tokens_ = {first, first};
  QUARRY_CHECK(first == tokens_.hi);
  QUARRY_RETURN_IF_ERROR(Reserve(count));
  const size_t vector = shape_.vector_bytes();
  for (uint32_t t = 0; t < count; ++t) {
    for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
      const size_t from = (size_t{t} * shape_.kv_heads + h) * vector, to = at(h, first + t);
      std::memcpy(k_.raw() + to, k + from, vector);
      std::memcpy(v_.raw() + to, v + from, vector);
    }
  }
  tokens_.hi += count;
  return absl::OkStatus();
}

void TokenSpan::DropBefore(uint32_t token) {
  token = std::clamp(token, tokens_.lo, tokens_.hi);
  start_ += token - tokens_.lo;
  tokens_.lo = token;
}

void TokenSpan::Truncate(uint32_t hi) {
  tokens_.hi = std::clamp(hi, tokens_.lo, tokens_.hi);
}

DeviceKv TokenSpan::Head(uint32_t kv_head, TokenRange range) const {
  const TokenRange in = Intersect(tokens_, range);
  if (in.empty()) return {nullptr, nullptr, in};
  return {k_.raw() + at(kv_head, in.lo), v_.raw() + at(kv_head, in.lo), in};
}

absl::StatusOr<TokenSpan> TokenSpan::Clone() const {
  TokenSpan out(device_, shape_);
  if (tokens_.empty()) return out;
  std::vector<std::byte> k(tokens_.size() * shape_.kv_heads * shape_.vector_bytes()), v(k.size());
  CopyOut(tokens_, k.data(), v.data());
  QUARRY_RETURN_IF_ERROR(out.Append(tokens_.lo, tokens_.size(), k.data(), v.data()));
  return out;
}

void TokenSpan::CopyOut(TokenRange range, std::byte* k, std::byte* v) const {
  QUARRY_CHECK(Intersect(range, tokens_) == range);
  const size_t vector = shape_.vector_bytes();
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
      const size_t to = (size_t{t - range.lo} * shape_.kv_heads + h) * vector;
      std::memcpy(k + to, k_.raw() + at(h, t), vector);
      std::memcpy(v + to, v_.raw() + at(h, t), vector);
    }
  }
}

absl::Status LocalKv::Append(uint32_t first, uint32_t count, const std::byte* k,
                             const std::byte* v) {
  if (window_.everything) return last_.Append(first, count, k, v);
  // The first tokens of the context stay for good; the others slide.
  const uint32_t head =
      first < window_.first ? std::min(count, window_.first - first) : 0;
  if (head > 0) {
    QUARRY_RETURN_IF_ERROR(first_.Append(first, head, k, v));
  }
  if (head == count) return absl::OkStatus();
  const size_t skip = size_t{head} * last_.token_bytes();
  return last_.Append(first + head, count - head, k + skip, v + skip);
}

void LocalKv::Slide(uint32_t tokens) {
  if (window_.everything) return;
  if (tokens > window_.first + window_.last) last_.DropBefore(tokens - window_.last);
}

void LocalKv::Truncate(uint32_t tokens) {
  first_.Truncate(tokens);
  last_.Truncate(tokens);
}

absl::StatusOr<LocalKv> LocalKv::Clone() const {
  LocalKv out = LocalKv(window_, first_.Empty(), last_.Empty());
  QUARRY_ASSIGN_OR_RETURN(out.first_, first_.Clone());
  QUARRY_ASSIGN_OR_RETURN(out.last_, last_.Clone());
  return out;
}

TokenRange LocalKv::Elsewhere() const {
  if (window_.everything || last_.tokens().empty()) return {};
  return {std::min(window_.first, last_.tokens().lo), last_.tokens().lo};
}

std::vector<DeviceKv> LocalKv::Head(uint32_t kv_head) const {
  std::vector<DeviceKv> out;
  for (const TokenSpan* span : {&first_, &last_}) {
    if (!span->tokens().empty()) out.push_back(span->Head(kv_head, span->tokens()));
  }
  return out;
}

}  // namespace quarry
