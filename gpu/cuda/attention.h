// Launchers of the attention kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/attention_args.h"
#include "proto/types.h"

namespace quarry::cuda {

// Whether the tensor kernel takes it; the plain one takes everything up to head_dim 512.
constexpr bool HasTensorAttention(DType dtype, uint32_t head_dim) {
  return dtype != DType::kFp32 && (head_dim == 64 || head_dim == 96 || head_dim == 128);
}

// Loads the kernels and allows them their shared memory.
cudaError_t PrepareAttention();

// bf16 or fp16 K and V, whose vectors, like q and o, lie at multiples of 16 bytes.
// row_tiles: 1 or 2. On Hopper a prefill's rows are attended by its own kernel, which
// PrepareSparseKernels loads.
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
