// Instances and launchers of the tensor kernel for one head_dim.
#pragma once

#include "gpu/cuda/attention.h"
#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/placed_attention.cuh"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that it uses.
#include "gpu/cuda/tensor_attention.cuh"

namespace quarry::cuda {

// Two blocks fit a multiprocessor where it has the shared memory for them; that leaves a thread
// 255 registers.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    TensorAttention(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(128) char shared[];
  AttendTile<T, Tile>(args, shared);
}

// The same of rows whose place is read on the card.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    PlacedTensorAttention(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(128) char shared[];
  AttendTile<T, Tile>(Placed(args), shared);
}

template <typename T, typename Tile>
cudaError_t PrepareTile() {
  const cudaError_t error = LoadKernel(TensorAttention<T, Tile>, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  return LoadKernel(PlacedTensorAttention<T, Tile>, Tile::kSharedBytes);
}

template <int kHeadDim>
cudaError_t PrepareHeadDim() {
  for (const auto prepare :
       {PrepareTile<Bf16, TensorTile<kHeadDim, 1>>, PrepareTile<Bf16, TensorTile<kHeadDim, 2>>,
        PrepareTile<Fp16, TensorTile<kHeadDim, 1>>, PrepareTile<Fp16, TensorTile<kHeadDim, 2>>}) {
    if (const cudaError_t error = prepare(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, typename Tile>
cudaError_t LaunchTile(const AttentionArgs& args, cudaStream_t stream) {
  const uint32_t queries = args.rows * args.group;
  const dim3 grid((queries + Tile::kQueries - 1) / Tile::kQueries, args.heads / args.group,
                  args.members * args.splits);
  const auto kernel =
      args.place != nullptr ? PlacedTensorAttention<T, Tile> : TensorAttention<T, Tile>;
  kernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t LaunchHeadDim(const AttentionArgs& args, DType dtype, uint32_t row_tiles,
                          cudaStream_t stream) {
  if (dtype == DType::kBf16) {
    return row_tiles == 1 ? LaunchTile<Bf16, TensorTile<kHeadDim, 1>>(args, stream)
                          : LaunchTile<Bf16, TensorTile<kHeadDim, 2>>(args, stream);
  }
  return row_tiles == 1 ? LaunchTile<Fp16, TensorTile<kHeadDim, 1>>(args, stream)
                        : LaunchTile<Fp16, TensorTile<kHeadDim, 2>>(args, stream);
}

}  // namespace quarry::cuda
