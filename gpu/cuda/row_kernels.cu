#include "gpu/cuda/row_kernels.h"

#include <algorithm>

#include "gpu/cuda/element.cuh"
#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/merge.cuh"

namespace quarry::cuda {
namespace {

constexpr int kThreads = 256;

// Blocks for `threads` threads of work in loops that stride over the grid: enough to fill any
// device several times over.
uint32_t BlocksFor(size_t threads) {
  return static_cast<uint32_t>(
      std::clamp<size_t>((threads + kThreads - 1) / kThreads, 1, size_t{1} << 14));
}

// f(T()) with the element type of `dtype`.
template <typename F>
cudaError_t WithElement(DType dtype, const F& f) {
  if (dtype == DType::kFp32) {
    f(float());
  } else if (dtype == DType::kFp16) {
    f(__half());
  } else {
    f(__nv_bfloat16());
  }
  return cudaGetLastError();
}

// One block for a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) RmsNorm(const NormArgs a) {
  const float* const x = a.x + blockIdx.x * a.width;
  float* const y = a.y + blockIdx.x * a.width;
  const T* const weight = static_cast<const T*>(a.weight);
  float squares = 0.0f;
  for (size_t i = threadIdx.x; i < a.width; i += kThreads) squares += x[i] * x[i];
  __shared__ float of_warp[kThreads / 32];
  squares = WarpSum(squares);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.0f;
  for (const float part : of_warp) total += part;
  const float scale = 1.0f / sqrtf(total / static_cast<float>(a.width) + a.eps);
  for (size_t i = threadIdx.x; i < a.width; i += kThreads) {
    y[i] = x[i] * scale * ToFloat(weight[i]);
  }
}

// A thread turns one pair of dimensions in up to kRopeHeads heads of a row: its sine and cosine,
// of angles up to the context's length and so of the accurate kind, serve all of them.
constexpr uint32_t kRopeHeads = 8;
__global__ void __launch_bounds__(kThreads) Rope(const __grid_constant__ RopeArgs a) {
  const uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x;
  const uint64_t row = i / a.pairs;
  const uint32_t pair = i % a.pairs;
  if (row >= a.rows) return;
  uint32_t token = a.first_token + static_cast<uint32_t>(row);
  if (a.place != nullptr) {
    token =
        a.place_each ? a.place[row].first_token : a.place->first_token + static_cast<uint32_t>(row);
  }
  const float position = static_cast<float>(token);
  float sine, cosine;
  sincosf(__fmul_rn(position, a.inv_freq[pair]), &sine, &cosine);
  sine *= a.attention_scale;
  cosine *= a.attention_scale;
  const uint32_t first = blockIdx.y * kRopeHeads, last = min(first + kRopeHeads, a.heads);
  for (uint32_t h = first; h < last; ++h) {
    float* const head = a.x + (row * a.heads + h) * a.head_dim + pair;
    const float x = head[0], y = head[a.pairs];
    head[0] = x * cosine - y * sine;
    head[a.pairs] = y * cosine + x * sine;
  }
}

// A block's threads lie along a row.
__global__ void __launch_bounds__(kThreads)
    SwiGlu(const float* gate_up, float* y, size_t rows, size_t width) {
  const size_t blocks_per_row = (width + kThreads - 1) / kThreads;
  for (size_t block = blockIdx.x; block < rows * blocks_per_row; block += gridDim.x) {
    const size_t row = block / blocks_per_row;
    const size_t i = block % blocks_per_row * kThreads + threadIdx.x;
    if (i >= width) continue;
    const float gate = gate_up[row * 2 * width + i], up = gate_up[row * 2 * width + width + i];
    y[row * width + i] = gate / (1.0f + expf(-gate)) * up;
  }
}

// One block for a token.
template <typename T>
__global__ void __launch_bounds__(kThreads) Embed(const __grid_constant__ EmbedArgs a) {
  const T* const from = static_cast<const T*>(a.table) + size_t{a.tokens[blockIdx.x]} * a.width;
  float* const to = a.y + blockIdx.x * a.width;
  for (size_t i = threadIdx.x; i < a.width; i += kThreads) to[i] = ToFloat(from[i]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) Round(const float* from, T* to, size_t elements) {
  const size_t step = size_t{gridDim.x} * kThreads;
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < elements; i += step) {
    to[i] = FromFloat<T>(from[i]);
  }
}

// The same for fours of elements, from multiples of 16 bytes to multiples of 4 elements.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x, y, z, w;
};
template <typename T>
__global__ void __launch_bounds__(kThreads)
    RoundFours(const float4* from, Four<T>* to, size_t fours) {
  const size_t step = size_t{gridDim.x} * kThreads;
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < fours; i += step) {
    const float4 x = from[i];
    to[i] = {FromFloat<T>(x.x), FromFloat<T>(x.y), FromFloat<T>(x.z), FromFloat<T>(x.w)};
  }
}

// A warp for a row.
__global__ void __launch_bounds__(kThreads) Merge(const MergeArgs a) {
  const size_t row = blockIdx.x * size_t{kThreads / 32} + threadIdx.x / 32;
  if (row >= a.rows) return;
  const MergeWeights merge(a.lse_a[row], a.lse_b[row]);
  if (merge.nothing()) return;
  for (uint32_t i = threadIdx.x % 32; i < a.head_dim; i += 32) {
    const size_t at = row * a.head_dim + i;
    a.o_a[at] = merge.Of(a.o_a[at], a.o_b[at]);
  }
  __syncwarp();  // all lanes have read lse_a
  if (threadIdx.x % 32 == 0) a.lse_a[row] = merge.lse();
}

// Index is 32 bits wide where the units can be counted so: its divisions are cheaper.
template <typename Unit, typename Index>
__global__ void __launch_bounds__(kThreads) Copy(const CopyArgs a) {
  const Index per_piece = static_cast<Index>(a.bytes / sizeof(Unit));
  const Index units = static_cast<Index>(a.count) * per_piece;
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  while (i < units) {
    const Index piece = i / per_piece, at = i % per_piece;
    const Unit* const from = reinterpret_cast<const Unit*>(a.from + piece * a.from_stride);
    Unit* const to = reinterpret_cast<Unit*>(a.to + piece * a.to_stride);
    to[at] = from[at];
    if (units - i <= step) return;  // i + step could wrap
    i += step;
  }
}

template <typename Unit>
cudaError_t LaunchCopyOf(const CopyArgs& args, cudaStream_t stream) {
  const size_t units = args.count * (args.bytes / sizeof(Unit));
  if (units >> 32 == 0) {
    Copy<Unit, uint32_t><<<BlocksFor(units), kThreads, 0, stream>>>(args);
  } else {
    Copy<Unit, uint64_t><<<BlocksFor(units), kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

// A thread for a unit of a vector; grid.y: K, V; grid.z: the store.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) StoreKv(const __grid_constant__ KvStores a) {
  const DeviceKvStore& s = a.stores[blockIdx.z];
  const uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x;
  const auto per_vector = static_cast<uint32_t>(s.vector_bytes / sizeof(Unit));
  const uint64_t vector = i / per_vector;
  if (vector >= uint64_t{s.rows} * s.kv_heads) return;
  const uint64_t row = vector / s.kv_heads, head = vector % s.kv_heads;
  uint64_t slot = s.slot;
  if (s.place != nullptr) slot = s.place->kv_slot + s.place->first_token - s.place->kv_lo;
  const void* const from = blockIdx.y == 0 ? s.k : s.v;
  void* const to = blockIdx.y == 0 ? s.to_k : s.to_v;
  auto* const there = reinterpret_cast<Unit*>(static_cast<char*>(to) + head * s.head_stride +
                                              (slot + row) * s.vector_bytes);
  there[i % per_vector] = static_cast<const Unit*>(from)[i];
}

template <typename Unit>
cudaError_t LaunchStoreOf(const KvStores& a, cudaStream_t stream) {
  size_t units = 0;  // of the largest
  for (uint32_t i = 0; i < a.count; ++i) {
    const DeviceKvStore& s = a.stores[i];
    units = std::max(units, size_t{s.rows} * s.kv_heads * (s.vector_bytes / sizeof(Unit)));
  }
  const dim3 grid(static_cast<uint32_t>((units + kThreads - 1) / kThreads), 2, a.count);
  StoreKv<Unit><<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LoadKernelsOf() {
  for (const cudaError_t error : {LoadKernel(RmsNorm<T>), LoadKernel(Embed<T>),
                                  LoadKernel(Round<T>), LoadKernel(RoundFours<T>)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Unit>
cudaError_t LoadCopyOf() {
  const cudaError_t error = LoadKernel(Copy<Unit, uint32_t>);
  return error != cudaSuccess ? error : LoadKernel(Copy<Unit, uint64_t>);
}

bool Aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

cudaError_t PrepareRowKernels() {
  for (const cudaError_t error :
       {LoadKernel(Rope), LoadKernel(SwiGlu), LoadKernel(Merge), LoadKernel(StoreKv<uint4>),
        LoadKernel(StoreKv<uint32_t>), LoadKernel(StoreKv<char>), LoadKernelsOf<float>(),
        LoadKernelsOf<__half>(), LoadKernelsOf<__nv_bfloat16>(), LoadCopyOf<uint4>(),
        LoadCopyOf<uint32_t>(), LoadCopyOf<char>()}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchRmsNorm(const NormArgs& args, cudaStream_t stream) {
  return WithElement(args.dtype, [&](auto element) {
    RmsNorm<decltype(element)><<<static_cast<uint32_t>(args.rows), kThreads, 0, stream>>>(args);
  });
}

cudaError_t LaunchRope(const RopeArgs& args, cudaStream_t stream) {
  const size_t threads = size_t{args.rows} * args.pairs;
  const dim3 grid(static_cast<uint32_t>((threads + kThreads - 1) / kThreads),
                  (args.heads + kRopeHeads - 1) / kRopeHeads);
  Rope<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchSwiGlu(const float* gate_up, float* y, size_t rows, size_t width,
                         cudaStream_t stream) {
  const size_t padded = (width + kThreads - 1) / kThreads * kThreads;
  SwiGlu<<<BlocksFor(rows * padded), kThreads, 0, stream>>>(gate_up, y, rows, width);
  return cudaGetLastError();
}

cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream) {
  return WithElement(args.dtype, [&](auto element) {
    Embed<decltype(element)><<<args.count, kThreads, 0, stream>>>(args);
  });
}

cudaError_t LaunchStoreKv(const KvStores& stores, cudaStream_t stream) {
  uintptr_t all = 0;
  for (uint32_t i = 0; i < stores.count; ++i) {
    const DeviceKvStore& s = stores.stores[i];
    all |= reinterpret_cast<uintptr_t>(s.k) | reinterpret_cast<uintptr_t>(s.v) |
           reinterpret_cast<uintptr_t>(s.to_k) | reinterpret_cast<uintptr_t>(s.to_v) |
           s.head_stride | s.vector_bytes;
  }
  if (all % 16 == 0) return LaunchStoreOf<uint4>(stores, stream);
  if (all % 4 == 0) return LaunchStoreOf<uint32_t>(stores, stream);
  return LaunchStoreOf<char>(stores, stream);
}

cudaError_t LaunchRound(const float* from, DType dtype, void* to, size_t elements,
                        cudaStream_t stream) {
  return WithElement(dtype, [&](auto element) {
    using T = decltype(element);
    const size_t fours = Aligned(from, 16) && Aligned(to, 4 * sizeof(T)) ? elements / 4 : 0;
    if (fours > 0) {
      RoundFours<T><<<BlocksFor(fours), kThreads, 0, stream>>>(
          reinterpret_cast<const float4*>(from), static_cast<Four<T>*>(to), fours);
    }
    if (const size_t rest = elements - 4 * fours; rest > 0) {
      Round<T><<<BlocksFor(rest), kThreads, 0, stream>>>(from + 4 * fours,
                                                         static_cast<T*>(to) + 4 * fours, rest);
    }
  });
}

cudaError_t LaunchMerge(const MergeArgs& args, cudaStream_t stream) {
  constexpr size_t kRows = kThreads / 32;
  Merge<<<static_cast<uint32_t>((args.rows + kRows - 1) / kRows), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchCopy(const CopyArgs& args, cudaStream_t stream) {
  const auto all = reinterpret_cast<uintptr_t>(args.to) | reinterpret_cast<uintptr_t>(args.from) |
                   args.bytes | (args.count > 1 ? args.to_stride | args.from_stride : 0);
  if (all % 16 == 0) return LaunchCopyOf<uint4>(args, stream);
  if (all % 4 == 0) return LaunchCopyOf<uint32_t>(args, stream);
  return LaunchCopyOf<char>(args, stream);
}

}  // namespace quarry::cuda
