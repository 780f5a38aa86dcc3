// The attention of everything that no tensor kernel takes, the merge of splits, and which tensor
// kernel takes a launch.
#include "gpu/cuda/attention.h"

#include "gpu/cuda/element.cuh"
#include "gpu/cuda/hopper_launch.h"
#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/placed_attention.cuh"

namespace quarry::cuda {
namespace {

constexpr int kWarps = 4;
constexpr uint32_t kMaxHeadDim = 512;

// One block for a query head of a row; its warps take every fourth token. A lane has kPerLane
// dimensions: lane, lane + 32, ...
template <typename T, int kPerLane>
__device__ void AttendPlainly(const AttentionArgs& a) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t row = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const uint32_t kv_head = head / a.group, d = a.head_dim;
  const uint32_t seen_hi = a.first_token + row + 1;
  const uint32_t seen_lo = a.window != 0 && seen_hi > a.window ? seen_hi - a.window : 0;
  const size_t vector = blockIdx.x;

  float q[kPerLane], acc[kPerLane];
  for (int e = 0; e < kPerLane; ++e) {
    const uint32_t i = lane + 32 * e;
    q[e] = i < d ? ToFloat(FromFloat<T>(a.q[vector * d + i])) * a.scale_log2 : 0.0f;
    acc[e] = 0.0f;
  }
  float largest = -INFINITY, sum = 0.0f;
  for (uint32_t p = 0; p < a.part_count; ++p) {
    const AttentionPart& part = a.parts[p];
    const T* const k = reinterpret_cast<const T*>(part.k + kv_head * part.head_stride);
    const T* const v = reinterpret_cast<const T*>(part.v + kv_head * part.head_stride);
    const uint32_t hi = min(part.hi, seen_hi);
    for (uint32_t t = max(part.lo, seen_lo) + warp; t < hi; t += kWarps) {
      const size_t at = size_t{t - part.lo} * d;
      float score = 0.0f;
      for (int e = 0; e < kPerLane; ++e) {
        const uint32_t i = lane + 32 * e;
        if (i < d) score += q[e] * ToFloat(k[at + i]);
      }
      score = WarpSum(score);
      const float now = fmaxf(largest, score), shrink = exp2f(largest - now);
      const float weight = exp2f(score - now);
      largest = now;
      sum = sum * shrink + weight;
      for (int e = 0; e < kPerLane; ++e) {
        const uint32_t i = lane + 32 * e;
        if (i < d) acc[e] = acc[e] * shrink + weight * ToFloat(v[at + i]);
      }
    }
  }

  __shared__ float warp_acc[kWarps][kMaxHeadDim];
  __shared__ float warp_max[kWarps], warp_sum[kWarps];
  for (int e = 0; e < kPerLane; ++e) {
    const uint32_t i = lane + 32 * e;
    if (i < d) warp_acc[warp][i] = acc[e];
  }
  if (lane == 0) {
    warp_max[warp] = largest;
    warp_sum[warp] = sum;
  }
  __syncthreads();
  float all = -INFINITY, total = 0.0f;
  for (int w = 0; w < kWarps; ++w) all = fmaxf(all, warp_max[w]);
  const bool seen = all > -INFINITY;
  float weights[kWarps];
  for (int w = 0; w < kWarps; ++w) {
    weights[w] = seen ? exp2f(warp_max[w] - all) : 0.0f;
    total += weights[w] * warp_sum[w];
  }
  for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) {
    float o = 0.0f;
    for (int w = 0; w < kWarps; ++w) o += weights[w] * warp_acc[w][i];
    a.o[vector * d + i] = seen ? o / total : 0.0f;
  }
  constexpr float kLn2 = 0.693147180559945f;
  if (threadIdx.x == 0) a.lse[vector] = seen ? all * kLn2 + logf(total) : -INFINITY;
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(32 * kWarps)
    PlainAttention(const __grid_constant__ AttentionArgs a) {
  AttendPlainly<T, kPerLane>(a);
}

// The same of rows whose place is read on the card.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(32 * kWarps)
    PlacedPlainAttention(const __grid_constant__ AttentionArgs a) {
  AttendPlainly<T, kPerLane>(Placed(a));
}

// A warp for a vector.
__global__ void __launch_bounds__(128) MergeSplits(const SplitMerge m) {
  const size_t vector = blockIdx.x * size_t{4} + threadIdx.x / 32;
  if (vector >= m.vectors) return;
  const uint32_t lane = threadIdx.x % 32;
  float largest = -INFINITY;
  for (uint32_t s = lane; s < m.splits; s += 32) {
    largest = fmaxf(largest, m.partial_lse[s * m.vectors + vector]);
  }
  largest = WarpMax(largest);
  const bool seen = largest > -INFINITY;
  float total = 0.0f;
  for (uint32_t s = lane; seen && s < m.splits; s += 32) {
    total += expf(m.partial_lse[s * m.vectors + vector] - largest);
  }
  total = WarpSum(total);
  for (uint32_t i = lane; i < m.head_dim; i += 32) {
    float o = 0.0f;
    for (uint32_t s = 0; seen && s < m.splits; ++s) {
      const size_t partial = s * m.vectors + vector;
      o += expf(m.partial_lse[partial] - largest) * m.partial_o[partial * m.head_dim + i];
    }
    m.o[vector * m.head_dim + i] = seen ? o / total : 0.0f;
  }
  if (lane == 0) m.lse[vector] = seen ? largest + logf(total) : -INFINITY;
}

template <typename T, int kPerLane>
cudaError_t LaunchPlain(const AttentionArgs& args, cudaStream_t stream) {
  const auto kernel =
      args.place != nullptr ? PlacedPlainAttention<T, kPerLane> : PlainAttention<T, kPerLane>;
  kernel<<<args.rows * args.heads, 32 * kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchPlain(const AttentionArgs& args, cudaStream_t stream) {
  return args.head_dim <= 128 ? LaunchPlain<T, 4>(args, stream) : LaunchPlain<T, 16>(args, stream);
}

template <typename T>
cudaError_t PreparePlain() {
  for (const auto kernel : {PlainAttention<T, 4>, PlainAttention<T, 16>, PlacedPlainAttention<T, 4>,
                            PlacedPlainAttention<T, 16>}) {
    const cudaError_t error = LoadKernel(kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether the launch is what a sparse prefill's dense heads are: rows that fill row tiles see all
// tokens before them, in one part, and nobody splits them.
bool IsDensePrefill(const AttentionArgs& args) {
  return args.place == nullptr && args.part_count == 1 && args.parts[0].lo == 0 &&
         args.window == 0 && args.splits == 1 && args.rows >= kRowTile &&
         args.parts[0].hi >= args.first_token + args.rows;
}

SparseArgs DenseArgsOf(const AttentionArgs& args, DType dtype) {
  SparseArgs out = {};
  out.q = args.q;
  out.o = args.o;
  out.lse = args.lse;
  out.k = args.parts[0].k;
  out.v = args.parts[0].v;
  out.head_stride = args.parts[0].head_stride;
  out.heads = args.heads;
  out.group = args.group;
  out.head_dim = args.head_dim;
  out.rows = args.rows;
  out.first_token = args.first_token;
  out.row_tiles = RowTilesOf(args.rows);
  out.scale_log2 = args.scale_log2;
  out.dtype = dtype;
  return out;
}

}  // namespace

cudaError_t PrepareAttention() {
  for (const auto prepare : {PrepareAttention64, PrepareAttention96, PrepareAttention128}) {
    if (const cudaError_t error = prepare(); error != cudaSuccess) return error;
  }
  for (const auto prepare :
       {PreparePlain<float>, PreparePlain<__half>, PreparePlain<__nv_bfloat16>}) {
    if (const cudaError_t error = prepare(); error != cudaSuccess) return error;
  }
  return LoadKernel(MergeSplits);
}

cudaError_t LaunchTensorAttention(const AttentionArgs& args, DType dtype, uint32_t row_tiles,
                                  cudaStream_t stream) {
  if (IsDensePrefill(args)) {
    const HopperKernels* const hopper = HopperKernelsHere(args.head_dim);
    if (hopper != nullptr) return hopper->attend(DenseArgsOf(args, dtype), stream);
  }
  if (args.head_dim == 64) return LaunchAttention64(args, dtype, row_tiles, stream);
  if (args.head_dim == 96) return LaunchAttention96(args, dtype, row_tiles, stream);
  return LaunchAttention128(args, dtype, row_tiles, stream);
}

cudaError_t LaunchPlainAttention(const AttentionArgs& args, DType dtype, cudaStream_t stream) {
  if (args.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  if (dtype == DType::kFp32) return LaunchPlain<float>(args, stream);
  if (dtype == DType::kFp16) return LaunchPlain<__half>(args, stream);
  return LaunchPlain<__nv_bfloat16>(args, stream);
}

cudaError_t LaunchSplitMerge(const SplitMerge& merge, cudaStream_t stream) {
  MergeSplits<<<static_cast<uint32_t>((merge.vectors + 3) / 4), 128, 0, stream>>>(merge);
  return cudaGetLastError();
}

}  // namespace quarry::cuda
