// Keys and values as the daemon's arena holds them, and memory that pushes them out of the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu_index/key_index.h"
#include "perf/trace.h"

namespace quarry::perf {

// Page-aligned zeroed memory, with all pages there.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(Pages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  std::byte* data_;
  size_t bytes_;
};

// One KV head of a trace, in strips of 256 tokens: keys, then values.
class HeadMemory {
 public:
  HeadMemory(const Trace& trace, uint32_t kv_head);

  size_t bytes() const { return pages_.size(); }
  // Segments of the tokens, cut at strips and at the range's ends.
  std::vector<KvSegment> Segments(TokenRange tokens) const;
  KvView View(std::span<const KvSegment> segments) const { return {segments, head_dim_, dtype_}; }

 private:
  const uint32_t head_dim_;
  const DType dtype_;
  const uint32_t tokens_;
  Pages pages_;
};

// Memory beside that of the heads, to read between two answers that are timed: together with the
// heads, `total` bytes at least, and never less than is read at once.
class WorkingSet {
 public:
  WorkingSet(size_t head_bytes, size_t total_bytes);

  // Reads this thread's part of twice what the last-level caches hold (they do not drop what is
  // oldest first), the next stretch in every round. When all `threads` have done so, nothing of the
  // heads is left in a cache. Returns a number that depends on what was read. Thread-safe.
  float PushOut(uint32_t thread, uint32_t threads, uint64_t round) const;
  size_t bytes() const { return memory_.size(); }

 private:
  const size_t push_bytes_;
  const Pages memory_;
};

}  // namespace quarry::perf
