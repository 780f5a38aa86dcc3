// K and V that the worker keeps itself, one layer: everything, or the static window.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "proto/types.h"

namespace quarry {

// Where vectors lie: on the device, or in memory of the host that it reads and writes over its
// link.
enum class KvMemory : uint8_t { kDevice, kHost };

// Consecutive tokens' K and V of one layer on a device, [kv_head][token][head_dim] each. Tokens
// come at the end and leave at the front.
class TokenSpan {
 public:
  TokenSpan(Device* device, const KvShape& shape, KvMemory memory = KvMemory::kDevice)
      : device_(device), shape_(shape), memory_(memory) {}

  TokenRange tokens() const { return tokens_; }
  uint64_t bytes() const { return k_.bytes() + v_.bytes(); }  // with the room to grow
  size_t token_bytes() const { return shape_.kv_heads * shape_.vector_bytes(); }  // of K or V
  TokenSpan Empty() const { return TokenSpan(device_, shape_, memory_); }

  // Room for `tokens` more, so that appending them moves nothing. The memory stays the same, unless
  // it is too small.
  absl::Status Reserve(uint32_t tokens);
  // Appends tokens [first, first + count), which lie on the device as [token][kv_head][head_dim].
  // They follow what is held; an empty span starts anywhere.
  absl::Status Append(uint32_t first, uint32_t count, const void* k, const void* v);
  // The same, but for the vectors themselves: by StoreOf.
  absl::Status Extend(uint32_t first, uint32_t count);
  // Of tokens that are held, which lie as Append's.
  DeviceKvStore StoreOf(uint32_t first, uint32_t count, const void* k, const void* v) const;
  absl::Status AppendFrom(const TokenSpan& other, TokenRange range);
  void DropBefore(uint32_t token);
  void Truncate(uint32_t hi);
  // Holds nothing, keeps its memory.
  void Clear();
  DeviceKv View() const;
  // The view, but from the memory's beginning: the first token is slot() vectors behind it.
  DeviceKv FromStart() const { return {k_.raw(), v_.raw(), head_stride(), tokens_}; }
  uint32_t slot() const { return start_; }

 private:
  // One of the two is empty.
  struct Part {
    DeviceBuffer on_device;
    HostBuffer on_host;
    std::byte* raw() const {
      return on_device.bytes() > 0 ? on_device.raw() : on_host.bytes().data();
    }
    size_t bytes() const { return on_device.bytes() + on_host.bytes().size(); }
  };
  absl::StatusOr<Part> Allocate(size_t bytes, std::string_view what) const;
  absl::Status Grow(uint32_t capacity);
  // Moves what is held to the memory's beginning.
  absl::Status Compact();
  size_t head_stride() const { return size_t{capacity_} * shape_.vector_bytes(); }
  // Of a token of head 0.
  size_t at(uint32_t token) const {
    return (size_t{start_} + token - tokens_.lo) * shape_.vector_bytes();
  }

  Device* device_;
  KvShape shape_;
  KvMemory memory_;
  Part k_, v_;
  uint32_t capacity_ = 0;  // tokens
  uint32_t start_ = 0;     // where tokens_.lo lies
  TokenRange tokens_;
};

// One layer's local part of a context: the static window (its first tokens and its last), or all
// of it. What lies between the window's parts is the daemon's.
class LocalKv {
 public:
  struct Window {
    uint32_t first = 128;
    uint32_t last = 512;
    bool everything = false;

    // What a context of `tokens` tokens keeps: its first tokens, and its last.
    std::pair<TokenRange, TokenRange> Kept(uint32_t tokens) const;
  };
  LocalKv(Device* device, const KvShape& shape, Window window, KvMemory memory = KvMemory::kDevice)
      : LocalKv(window, TokenSpan(device, shape, memory), TokenSpan(device, shape, memory)) {}

  // Room for what a context of `tokens` tokens has in the window's first part, or, with everything,
  // at all.
  absl::Status Reserve(uint32_t tokens);

  // Tokens that follow what is held, or that begin the window's last part; on the device as
  // [token][kv_head][head_dim].
  absl::Status Append(uint32_t first, uint32_t count, const void* k, const void* v);
  // The same of tokens behind the window's first part, but for the vectors themselves: those are
  // stored by StoreOf, where Place says.
  absl::Status Extend(uint32_t first, uint32_t count);
  DeviceKvStore StoreOf(uint32_t first, uint32_t count, const void* k, const void* v) const {
    return last_.StoreOf(first, count, k, v);
  }
  // Of rows from `first` on, which have been stored or are about to be.
  DevicePlace Place(uint32_t first) const { return {first, last_.tokens().lo, last_.slot()}; }
  // As Parts, of which the last one is the growing part, from the beginning of its memory.
  std::vector<DeviceKv> PlacedParts() const;
  // The window of a context of `tokens` tokens, all of which are in `all`.
  absl::Status Assign(const TokenSpan& all, uint32_t tokens);
  // Forgets what a context of `tokens` tokens does not keep.
  void Slide(uint32_t tokens);
  // Back to `tokens`; only tokens that are still held can be dropped.
  void Truncate(uint32_t tokens);
  absl::StatusOr<LocalKv> Clone() const;

  uint64_t bytes() const { return first_.bytes() + last_.bytes(); }
  // Tokens of a context of `tokens` tokens that are not held here.
  TokenRange Elsewhere(uint32_t tokens) const;
  // What is held, in token order: one or two parts, or none.
  std::vector<DeviceKv> Parts() const;

 private:
  LocalKv(Window window, TokenSpan first, TokenSpan last)
      : window_(window), first_(std::move(first)), last_(std::move(last)) {}

  Window window_;
  TokenSpan first_, last_;  // `everything`: all in last_
};

}  // namespace quarry
