// Launchers of the kernels that choose columns and slashes, and of those that make an index.
#include <algorithm>

#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/sparse_launch.h"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that they use.
#include "gpu/cuda/index_rows.cuh"
#include "gpu/cuda/last_queries.cuh"
#include "gpu/cuda/line_lists.cuh"
#include "gpu/cuda/score_sum.cuh"

namespace quarry::cuda {
namespace {

// A try reads sums of all tokens some ten times, and a multiprocessor that has it alone or with
// another one.
constexpr uint32_t kTryThreads = 1024, kThreads = 256;

__global__ void __launch_bounds__(kThreads) Join(const __grid_constant__ LastQueryArgs args) {
  __shared__ float2 shared[kThreads];
  JoinMeasures(args, kThreads, reinterpret_cast<ScoreSum*>(shared));
}
__global__ void __launch_bounds__(kTryThreads) Try(const __grid_constant__ ChooseLinesArgs args) {
  __shared__ LineShared shared;
  TryLines(args, kTryThreads, &shared);
}
__global__ void __launch_bounds__(kTryThreads) Keep(const __grid_constant__ KeepLinesArgs args) {
  __shared__ LineShared shared;
  KeepLines(args, kTryThreads, &shared);
}
__global__ void __launch_bounds__(kThreads) Emit(const __grid_constant__ EmitLinesArgs args) {
  EmitLines(args, kThreads);
}
__global__ void __launch_bounds__(kThreads) Count(const __grid_constant__ IndexArgs args) {
  CountRowTiles(args, kThreads);
}
__global__ void __launch_bounds__(1024) Order(const __grid_constant__ IndexArgs args) {
  __shared__ OrderShared shared;
  OrderItems(args, blockDim.x, &shared);
}

}  // namespace

cudaError_t PrepareLineKernels() {
  for (const cudaError_t error : {LoadKernel(Join), LoadKernel(Try), LoadKernel(Keep),
                                  LoadKernel(Emit), LoadKernel(Count), LoadKernel(Order)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchSumLastQueries(const LastQueryArgs& args, cudaStream_t stream) {
  const SparseTensorKernels& kernels = TensorKernelsOf(args.head_dim);
  if (const cudaError_t error = kernels.measure_last(args, stream); error != cudaSuccess) {
    return error;
  }
  Join<<<args.line_count, kThreads, 0, stream>>>(args);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return kernels.sum_last(args, stream);
}

cudaError_t LaunchChooseLines(const KeepLinesArgs& args, cudaStream_t stream) {
  const ChooseLinesArgs& tried = args.tried;
  Try<<<dim3(std::max(tried.tries, 2u), tried.line_count), kTryThreads, 0, stream>>>(tried);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  Keep<<<tried.line_count, kTryThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchEmitLines(const EmitLinesArgs& args, cudaStream_t stream) {
  Emit<<<args.line_count, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchCountRowTiles(const IndexArgs& args, cudaStream_t stream) {
  Count<<<dim3((args.row_tiles + kThreads - 1) / kThreads, args.heads), kThreads, 0, stream>>>(
      args);
  return cudaGetLastError();
}

cudaError_t LaunchOrderItems(const IndexArgs& args, cudaStream_t stream) {
  const uint32_t items = args.heads * args.row_tiles;
  const uint32_t threads = std::clamp((items + 31) / 32 * 32, 32u, 1024u);
  Order<<<1, threads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quarry::cuda
