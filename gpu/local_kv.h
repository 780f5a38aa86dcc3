// K and V that the worker keeps itself, one layer: everything, or the static window.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "proto/types.h"

namespace quarry {

// Tokens [lo, hi) of all KV heads of a layer: [kv_head][token][head_dim] of a dtype, in one
// growing device buffer per part. Tokens come at the end and leave at the front.
class TokenSpan {
 public:
  TokenSpan(Device* device, const KvShape& shape) : device_(device), shape_(shape) {}

  TokenRange tokens() const { return tokens_; }
  uint64_t bytes() const;  // of K and V held, with room to grow
  size_t token_bytes() const { return shape_.kv_heads * shape_.vector_bytes(); }
  TokenSpan Empty() const { return TokenSpan(device_, shape_); }
  // Appends tokens [tokens().hi, +count), given as [token][kv_head][head_dim]. An empty span
  // starts at `first`.
  absl::Status Append(uint32_t first, uint32_t count, const std::byte* k, const std::byte* v);
  void DropBefore(uint32_t token);
  void Truncate(uint32_t hi);
  // One KV head's part within `range`.
  DeviceKv Head(uint32_t kv_head, TokenRange range) const;
  absl::StatusOr<TokenSpan> Clone() const;
  // [token][kv_head][head_dim] of `range`, as the daemon takes it.
  void CopyOut(TokenRange range, std::byte* k, std::byte* v) const;

 private:
  absl::Status Reserve(uint32_t tokens);
  size_t head_stride() const { return size_t{capacity_} * shape_.vector_bytes(); }
  size_t at(uint32_t kv_head, uint32_t token) const {
    return kv_head * head_stride() + (start_ + token - tokens_.lo) * shape_.vector_bytes();
  }

  Device* device_;
  KvShape shape_;
  DeviceBuffer k_, v_;
  uint32_t capacity_ = 0;  // tokens per head
  uint32_t start_ = 0;     // where tokens_.lo lies
  TokenRange tokens_;
};

// The static window of one layer: the first tokens and the last. What lies between is the
// daemon's. With last = all, the whole context.
class LocalKv {
 public:
  struct Window {
    uint32_t first = 128;
    uint32_t last = 512;
    bool everything = false;
  };
  LocalKv(Device* device, const KvShape& shape, Window window)
      : LocalKv(window, TokenSpan(device, shape), TokenSpan(device, shape)) {}

  // The next tokens of the context, as [token][kv_head][head_dim].
  absl::Status Append(uint32_t first, uint32_t count, const std::byte* k, const std::byte* v);
  // Forgets what a context of `tokens` tokens does not keep.
  void Slide(uint32_t tokens);
  // Back to `tokens`; only tokens that are still held can be dropped.
  void Truncate(uint32_t tokens);
  absl::StatusOr<LocalKv> Clone() const;

  uint64_t bytes() const { return first_.bytes() + last_.bytes(); }
  // What the daemon answers for a row of a context whose local part starts here: [lo, hi).
  TokenRange Elsewhere() const;
  // One KV head's local parts, in token order.
  std::vector<DeviceKv> Head(uint32_t kv_head) const;

 private:
  LocalKv(Window window, TokenSpan first, TokenSpan last)
      : window_(window), first_(std::move(first)), last_(std::move(last)) {}

  Window window_;
  TokenSpan first_, last_;
};

}  // namespace quarry
