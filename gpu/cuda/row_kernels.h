// The kernels of a layer's rows outside products and attention. Pointers are the device's; shapes
// are checked by who launches, and no shape is empty.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gpu/device.h"
#include "proto/types.h"

namespace quarry::cuda {

// Loads the kernels.
cudaError_t PrepareRowKernels();

struct NormArgs {
  const float* x;  // [rows][width]
  const void* weight;
  DType dtype;  // of weight [width]
  float* y;     // as x; may be x
  size_t rows, width;
  float eps;
};
cudaError_t LaunchRmsNorm(const NormArgs& args, cudaStream_t stream);

// Pairs of a head that turn; head_dim is at most 512.
inline constexpr uint32_t kMaxRopePairs = 256;
struct RopeArgs {
  float* x;  // [rows][heads][head_dim]
  uint32_t first_token, rows, heads, head_dim, pairs;
  float attention_scale;
  const DevicePlace* place;  // null: first_token counts
  bool place_each;           // of [rows] places, each row that of its own
  float inv_freq[kMaxRopePairs];
};
cudaError_t LaunchRope(const RopeArgs& args, cudaStream_t stream);

cudaError_t LaunchSwiGlu(const float* gate_up, float* y, size_t rows, size_t width,
                         cudaStream_t stream);

// Tokens of one launch: they travel as kernel parameters.
inline constexpr uint32_t kMaxEmbedTokens = 960;
struct EmbedArgs {
  const void* table;  // [..][width]
  DType dtype;
  float* y;  // [count][width]
  size_t width;
  uint32_t count;
  uint32_t tokens[kMaxEmbedTokens];
};
cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream);

// Stores of one launch: they travel as kernel parameters.
inline constexpr uint32_t kMaxStores = 32;
struct KvStores {
  uint32_t count;  // at least 1
  DeviceKvStore stores[kMaxStores];
};
static_assert(sizeof(KvStores) <= 4096);  // what a kernel's parameters may have everywhere
// Any alignment; 16 bytes at a time where all is a multiple of 16, else 4 or 1.
cudaError_t LaunchStoreKv(const KvStores& stores, cudaStream_t stream);

// to is aligned to its elements.
cudaError_t LaunchRound(const float* from, DType dtype, void* to, size_t elements,
                        cudaStream_t stream);

// Merges partial b into a, as MergeFinished.
struct MergeArgs {
  float* o_a;  // [rows][head_dim]
  float* lse_a;
  const float* o_b;
  const float* lse_b;
  size_t rows;
  uint32_t head_dim;
};
cudaError_t LaunchMerge(const MergeArgs& args, cudaStream_t stream);

// `count` pieces of `bytes` each, as DeviceCopy. Any alignment; 16 bytes at a time where all is a
// multiple of 16, else 4 or 1.
struct CopyArgs {
  char* to;
  size_t to_stride;
  const char* from;
  size_t from_stride, bytes, count;
};
cudaError_t LaunchCopy(const CopyArgs& args, cudaStream_t stream);

}  // namespace quarry::cuda
