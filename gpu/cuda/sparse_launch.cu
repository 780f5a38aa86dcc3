#include "gpu/cuda/sparse_launch.h"

#include <algorithm>

#include "gpu/cuda/hopper_launch.h"
#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that they use.
#include "gpu/cuda/choosing.cuh"
#include "gpu/cuda/sparse_attention.cuh"

namespace quarry::cuda {
namespace {

constexpr uint32_t kThreads = 256, kMeasureThreads = 512;
// Blocks of a head whose threads stride over its work.
constexpr uint32_t kBlocksPerHead = 64;

__global__ void __launch_bounds__(kThreads) Compact(const __grid_constant__ SparseArgs args) {
  CompactColumns(args, kThreads);
}
__global__ void __launch_bounds__(kThreads) Mask(const __grid_constant__ SparseArgs args) {
  MaskColumns(args, kThreads);
}
__global__ void __launch_bounds__(kMeasureThreads)
    Measure(const __grid_constant__ ChoiceArgs args) {
  __shared__ float2 shared[kMeasureThreads];
  MeasureScores(args, kMeasureThreads, reinterpret_cast<ScoreSum*>(shared));
}
__global__ void __launch_bounds__(kThreads) Choose(const __grid_constant__ ChoiceArgs args) {
  __shared__ BlocksShared shared;
  BlockChooser(args, kThreads, &shared).Run();
}
template <typename T>
__global__ void __launch_bounds__(64) Mean(const __grid_constant__ MeanArgs args) {
  MeanKeys<T>(args);
}
__global__ void __launch_bounds__(128) Pool(const __grid_constant__ PoolArgs args) {
  PoolQueries(args);
}

}  // namespace

const SparseTensorKernels& TensorKernelsOf(uint32_t head_dim) {
  if (head_dim == 64) return kSparseTensorKernels64;
  if (head_dim == 96) return kSparseTensorKernels96;
  return kSparseTensorKernels128;
}

cudaError_t PrepareSparseKernels() {
  for (const uint32_t head_dim : {64u, 96u, 128u}) {
    const cudaError_t error = TensorKernelsOf(head_dim).prepare();
    if (error != cudaSuccess) return error;
    const HopperKernels* const hopper = HopperKernelsHere(head_dim);
    if (hopper == nullptr) continue;
    if (const cudaError_t error = hopper->prepare(); error != cudaSuccess) return error;
  }
  for (const cudaError_t error :
       {LoadKernel(Compact), LoadKernel(Mask), LoadKernel(Measure), LoadKernel(Choose),
        LoadKernel(Mean<Bf16>), LoadKernel(Mean<Fp16>), LoadKernel(Pool)}) {
    if (error != cudaSuccess) return error;
  }
  return PrepareLineKernels();
}

cudaError_t LaunchSparseAttention(const SparseArgs& args, AttentionPath path, cudaStream_t stream) {
  if (args.column_k != nullptr) {
    const dim3 grid(kBlocksPerHead, args.heads);
    Compact<<<grid, kThreads, 0, stream>>>(args);
    Mask<<<grid, kThreads, 0, stream>>>(args);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  const HopperKernels* const hopper = HopperKernelsHere(args.head_dim);
  if (hopper != nullptr && path == AttentionPath::kBest) return hopper->attend(args, stream);
  return TensorKernelsOf(args.head_dim).attend(args, stream);
}

cudaError_t LaunchScores(const ScoreArgs& args, cudaStream_t stream) {
  return TensorKernelsOf(args.head_dim).score(args, stream);
}

cudaError_t LaunchSeekBlocks(const SeekArgs& args, cudaStream_t stream) {
  return TensorKernelsOf(args.head_dim).seek(args, stream);
}

cudaError_t LaunchMeasure(const ChoiceArgs& args, cudaStream_t stream) {
  Measure<<<dim3(args.queries, args.launched_heads), kMeasureThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchChooseBlocks(const ChoiceArgs& args, cudaStream_t stream) {
  const dim3 grid(RowTilesOf(args.rows), args.launched_heads);
  Choose<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchMeanKeys(const MeanArgs& args, cudaStream_t stream) {
  const dim3 grid(args.blocks + RowTilesOf(args.rows), args.kv_heads);
  const auto kernel = args.dtype == DType::kBf16 ? Mean<Bf16> : Mean<Fp16>;
  kernel<<<grid, args.head_dim / 2, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchPoolQueries(const PoolArgs& args, cudaStream_t stream) {
  const dim3 grid(2 * RowTilesOf(args.rows), args.heads);
  Pool<<<grid, args.head_dim, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quarry::cuda
