// Attention kernels: their arguments and launchers. Plain C++, so that the kernels' sources and
// the device's see the same.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "proto/types.h"

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

// The query heads of a KV head's group and a token's rows lie behind one another: "query" i of a
// KV head is head i % group of row i / group.
struct AttentionArgs {
  const float* q;  // [rows][heads][head_dim]
  // [splits][rows][heads][head_dim] and [splits][rows][heads]: split s of the launch writes the
  // partial of its share of the key tiles there.
  float* o;
  float* lse;
  uint32_t heads, group, head_dim, rows, first_token, window;
  uint32_t splits, part_count;
  float scale_log2;  // of scores: log2(e) / sqrt(head_dim)
  AttentionPart parts[kMaxAttentionParts];
};

// Keys of one step of the kernel.
inline constexpr uint32_t kAttentionKeys = 64;
// Queries of one block of threads, by 16-row tiles per warp (1 or 2).
constexpr uint32_t AttentionQueries(uint32_t row_tiles) { return 64 * row_tiles; }

// Whether the tensor kernel takes it; the plain one takes everything up to head_dim 512.
constexpr bool HasTensorAttention(DType dtype, uint32_t head_dim) {
  return dtype != DType::kFp32 && (head_dim == 64 || head_dim == 96 || head_dim == 128);
}

// Loads the kernels and allows them their shared memory.
cudaError_t PrepareAttention();

// bf16 or fp16 K and V, whose vectors, like q and o, lie at multiples of 16 bytes.
// row_tiles: 1 or 2.
cudaError_t LaunchTensorAttention(const AttentionArgs& args, DType dtype, uint32_t row_tiles,
                                  cudaStream_t stream);
// Any dtype, head_dim up to 512, aligned to their elements. One split.
cudaError_t LaunchPlainAttention(const AttentionArgs& args, DType dtype, cudaStream_t stream);

// Merges partials of disjoint tokens, [splits][vectors][head_dim] with lse [splits][vectors].
struct SplitMerge {
  const float* partial_o;
  const float* partial_lse;
  float* o;    // [vectors][head_dim]
  float* lse;  // [vectors]
  size_t vectors;
  uint32_t splits, head_dim;
};
cudaError_t LaunchSplitMerge(const SplitMerge& merge, cudaStream_t stream);

// By head_dim, in files of their own so that they compile side by side.
cudaError_t PrepareAttention64();
cudaError_t PrepareAttention96();
cudaError_t PrepareAttention128();
cudaError_t LaunchAttention64(const AttentionArgs&, DType, uint32_t row_tiles, cudaStream_t);
cudaError_t LaunchAttention96(const AttentionArgs&, DType, uint32_t row_tiles, cudaStream_t);
cudaError_t LaunchAttention128(const AttentionArgs&, DType, uint32_t row_tiles, cudaStream_t);

}  // namespace quarry::cuda
