#include "gpu/cuda/token_choice.h"

#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that it uses.
#include "gpu/cuda/token_choice.cuh"

namespace quarry::cuda {
namespace {

// One block for a row: there are few, and a row is read from the L2 cache.
constexpr uint32_t kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    ChooseTokens(const __grid_constant__ TokenChoiceArgs a) {
  __shared__ TokenChoiceShared shared;
  const DeviceLogits& l = a.logits;
  const RowOfLogits row{l.logits, a.first_row + blockIdx.x, l.rows, l.vocab, l.tile};
  ChooseTokenOfRow(row, a.draws[blockIdx.x], kThreads, &shared, a.out + blockIdx.x);
}

}  // namespace

cudaError_t PrepareTokenChoice() { return LoadKernel(ChooseTokens); }

cudaError_t LaunchTokenChoice(const TokenChoiceArgs& args, cudaStream_t stream) {
  ChooseTokens<<<args.rows, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quarry::cuda
