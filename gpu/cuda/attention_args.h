// What an attention kernel is told. Plain C++: kernels, device and tests without CUDA see the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quarry {
struct DevicePlace;
}

namespace quarry::cuda {

// K and V of tokens [lo, hi) of every KV head, as DeviceKv.
struct AttentionPart {
  const std::byte* k;
  const std::byte* v;
  size_t head_stride;  // bytes
  uint32_t lo, hi;
};

// Parts of one launch: they travel as kernel parameters, 4 KiB in all.
inline constexpr uint32_t kMaxAttentionParts = 64;
// Parts of rows with a place: the last one grows, others may be empty.
inline constexpr uint32_t kPlacedParts = 2;
// Attentions of one launch, if their rows have places.
inline constexpr uint32_t kMaxAttentionMembers = kMaxAttentionParts / kPlacedParts;

// The query heads of a KV head's group and a token's rows lie behind one another: "query" i of a
// KV head is head i % group of row i / group.
struct AttentionArgs {
  const float* q;  // [rows][heads][head_dim]
  // [splits][members][rows][heads][head_dim] and without the last: split s of the launch writes the
  // partials of its share of the key tiles there.
  float* o;
  float* lse;
  // Attentions that the launch does, with a place one behind the other and kPlacedParts parts each;
  // without, one. Their q, o and lse lie one behind the other.
  uint32_t members;
  uint32_t heads, group, head_dim, rows, first_token, window;
  uint32_t splits, part_count;
  float scale_log2;  // of scores: log2(e) / sqrt(head_dim)
  AttentionPart parts[kMaxAttentionParts];
  const DevicePlace* place;  // as DeviceAttention's, [members]
  size_t vector_bytes;       // of K's and V's
};

static_assert(sizeof(AttentionArgs) <= 4096);  // what a kernel's parameters may have everywhere

// Keys of one step of the kernel.
inline constexpr uint32_t kAttentionKeys = 64;
// Queries of one block of threads, by 16-row tiles per warp (1 or 2).
constexpr uint32_t AttentionQueries(uint32_t row_tiles) { return 64 * row_tiles; }

}  // namespace quarry::cuda
