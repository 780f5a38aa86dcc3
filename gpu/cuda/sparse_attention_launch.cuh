// Instances and launchers of sparse prefill's tensor kernels for one head_dim.
#pragma once

#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/sparse_launch.h"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that they use.
#include "gpu/cuda/key_scores.cuh"
#include "gpu/cuda/last_queries.cuh"
#include "gpu/cuda/seek_blocks.cuh"
#include "gpu/cuda/sparse_attention.cuh"

namespace quarry::cuda {

// Two blocks of a multiprocessor, as in tensor_attention_launch.cuh.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    SparseTensorAttention(const __grid_constant__ SparseArgs args) {
  extern __shared__ __align__(128) char shared[];
  AttendRowTile<T, Tile>(args, shared);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    TensorScores(const __grid_constant__ ScoreArgs args) {
  extern __shared__ __align__(128) char shared[];
  ScoreKeys<T, Tile>(args, shared);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    TensorSeek(const __grid_constant__ SeekArgs args) {
  extern __shared__ __align__(128) char shared[];
  SeekBlocks<T, Tile>(args, shared);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    TensorMeasureLast(const __grid_constant__ LastQueryArgs args) {
  extern __shared__ __align__(128) char shared[];
  MeasureLastQueries<T, Tile>(args, shared);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    TensorSumLast(const __grid_constant__ LastQueryArgs args) {
  extern __shared__ __align__(128) char shared[];
  SumLastQueries<T, Tile>(args, shared);
}

template <int kHeadDim>
struct SparseHeadDim {
  using Attention = SparseTile<kHeadDim>;
  using Scores = ScoreTile<kHeadDim>;
  using Seeking = SeekTile<kHeadDim>;
  using Last = LastTile<kHeadDim>;

  static cudaError_t Prepare() {
    for (const cudaError_t error :
         {LoadKernel(SparseTensorAttention<Bf16, Attention>, Attention::kSharedBytes),
          LoadKernel(SparseTensorAttention<Fp16, Attention>, Attention::kSharedBytes),
          LoadKernel(TensorScores<Bf16, Scores>, Scores::kSharedBytes),
          LoadKernel(TensorScores<Fp16, Scores>, Scores::kSharedBytes),
          LoadKernel(TensorSeek<Bf16, Seeking>, Seeking::kSharedBytes),
          LoadKernel(TensorSeek<Fp16, Seeking>, Seeking::kSharedBytes),
          LoadKernel(TensorMeasureLast<Bf16, Last>, Last::kMeasureBytes),
          LoadKernel(TensorMeasureLast<Fp16, Last>, Last::kMeasureBytes),
          LoadKernel(TensorSumLast<Bf16, Last>, Last::kSumBytes),
          LoadKernel(TensorSumLast<Fp16, Last>, Last::kSumBytes)}) {
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  static cudaError_t Attend(const SparseArgs& args, cudaStream_t stream) {
    const auto kernel = args.dtype == DType::kBf16 ? SparseTensorAttention<Bf16, Attention>
                                                   : SparseTensorAttention<Fp16, Attention>;
    kernel<<<args.heads * args.row_tiles, Attention::kThreads, Attention::kSharedBytes, stream>>>(
        args);
    return cudaGetLastError();
  }

  static cudaError_t Score(const ScoreArgs& args, cudaStream_t stream) {
    const auto kernel =
        args.dtype == DType::kBf16 ? TensorScores<Bf16, Scores> : TensorScores<Fp16, Scores>;
    constexpr uint32_t kKeys = Scores::kSteps * kKeyTile, kQueries = Scores::kQueries;
    const dim3 grid((args.keys + kKeys - 1) / kKeys, (args.queries + kQueries - 1) / kQueries,
                    args.launched_heads);
    kernel<<<grid, Scores::kThreads, Scores::kSharedBytes, stream>>>(args);
    return cudaGetLastError();
  }

  static cudaError_t Seek(const SeekArgs& args, cudaStream_t stream) {
    const auto kernel =
        args.dtype == DType::kBf16 ? TensorSeek<Bf16, Seeking> : TensorSeek<Fp16, Seeking>;
    kernel<<<dim3(RowTilesOf(args.rows), args.launched_heads), Seeking::kThreads,
             Seeking::kSharedBytes, stream>>>(args);
    return cudaGetLastError();
  }
  static dim3 LastGrid(const LastQueryArgs& args) {
    return dim3(StretchesOf(args.tokens), args.line_count / kLinesTogether);
  }
  static cudaError_t MeasureLast(const LastQueryArgs& args, cudaStream_t stream) {
    const auto kernel =
        args.dtype == DType::kBf16 ? TensorMeasureLast<Bf16, Last> : TensorMeasureLast<Fp16, Last>;
    kernel<<<LastGrid(args), Last::kThreads, Last::kMeasureBytes, stream>>>(args);
    return cudaGetLastError();
  }
  static cudaError_t SumLast(const LastQueryArgs& args, cudaStream_t stream) {
    const auto kernel =
        args.dtype == DType::kBf16 ? TensorSumLast<Bf16, Last> : TensorSumLast<Fp16, Last>;
    kernel<<<LastGrid(args), Last::kThreads, Last::kSumBytes, stream>>>(args);
    return cudaGetLastError();
  }

  static constexpr SparseTensorKernels kAll = {Prepare, Attend, Score, Seek, MeasureLast, SumLast};
};

}  // namespace quarry::cuda
