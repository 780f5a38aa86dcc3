// Launchers of the attention kernel for Hopper (sm_90a).
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

// By head_dim, in files of their own so that they compile side by side.
struct HopperKernels {
  // Loads the kernels and allows them their shared memory.
  cudaError_t (*prepare)();
  // As LaunchSparseAttention, once the columns are compacted and masked. Without an order
  // (args.order is null) every head is dense, and of the index only heads, rows, first_token and
  // row_tiles are read.
  cudaError_t (*attend)(const SparseArgs& args, cudaStream_t stream);
};

// Those for heads of 64, 96 or 128; null if this program has none or the current card is another.
const HopperKernels* HopperKernelsHere(uint32_t head_dim);
// Of the current card.
uint32_t Multiprocessors();

extern const HopperKernels kHopperKernels64;
extern const HopperKernels kHopperKernels96;
extern const HopperKernels kHopperKernels128;

}  // namespace quarry::cuda
