// Instances and launchers of the kernel for Hopper for one head_dim.
#pragma once

#include <algorithm>

#include "gpu/cuda/hopper_attention.cuh"
#include "gpu/cuda/hopper_launch.h"
#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/tensor_map.h"

namespace quarry::cuda {

// One block of a multiprocessor: with its three warpgroups it takes all registers.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    HopperAttention(const __grid_constant__ HopperArgs args) {
  extern __shared__ __align__(1024) char shared[];
  AttendRowTiles<T, Tile>(args, shared);
}

template <int kHeadDim>
struct HopperHeadDim {
  using Tile = HopperTile<kHeadDim>;
  static_assert(sizeof(HopperShared<Tile>) <= 227 << 10);

  static cudaError_t Prepare() {
    constexpr int kBytes = sizeof(HopperShared<Tile>);
    const cudaError_t error = LoadKernel(HopperAttention<Bf16, Tile>, kBytes);
    return error != cudaSuccess ? error : LoadKernel(HopperAttention<Fp16, Tile>, kBytes);
  }

  static cudaError_t Attend(const SparseArgs& sparse, cudaStream_t stream) {
    HopperArgs args = {};
    args.sparse = sparse;
    TensorMapShape shape = {};
    shape.head_dim = kHeadDim;
    shape.box_tokens = kKeyTile;
    shape.box_dims = Tile::kPanelDims;
    shape.heads = sparse.heads / sparse.group;
    shape.tokens = sparse.first_token + sparse.rows;
    shape.head_stride = sparse.head_stride;
    cudaError_t error = MakeMaps(shape, sparse.k, sparse.v, &args.k, &args.v);
    if (error != cudaSuccess) return error;
    if (sparse.column_k != nullptr) {
      shape.heads = 1;
      shape.tokens = sparse.column_count;
      shape.head_stride = 0;
      error = MakeMaps(shape, sparse.column_k, sparse.column_v, &args.column_k, &args.column_v);
      if (error != cudaSuccess) return error;
    }
    const auto kernel =
        sparse.dtype == DType::kBf16 ? HopperAttention<Bf16, Tile> : HopperAttention<Fp16, Tile>;
    const uint32_t items = sparse.heads * sparse.row_tiles;
    kernel<<<std::min(items, Multiprocessors()), Tile::kThreads, sizeof(HopperShared<Tile>),
             stream>>>(args);
    return cudaGetLastError();
  }

  static cudaError_t MakeMaps(TensorMapShape shape, const std::byte* k, const std::byte* v,
                              CUtensorMap* k_map, CUtensorMap* v_map) {
    shape.data = k;
    const cudaError_t error = MakeTensorMap(shape, k_map);
    shape.data = v;
    return error != cudaSuccess ? error : MakeTensorMap(shape, v_map);
  }

  static constexpr HopperKernels kAll = {Prepare, Attend};
};

}  // namespace quarry::cuda
