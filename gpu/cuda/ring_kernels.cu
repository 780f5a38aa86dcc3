// The host's memory is reached over the bus: what is written goes out in one piece per warp, and
// what is read is asked for before any of it is needed.
#include "gpu/cuda/ring_kernels.h"

#include <cstddef>

#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/merge.cuh"
#include "proto/shm_layout.h"

namespace quarry::cuda {
namespace {

constexpr uint32_t kThreads = 256, kWarp = 32;
// Of a vector's floats per lane, read at once.
constexpr uint32_t kAhead = 4;

// A submit entry is written as words; what stands where.
static_assert(offsetof(shm::SubmitEntry, sequence) == 0 && offsetof(shm::SubmitEntry, slot) == 8 &&
              offsetof(shm::SubmitEntry, opcode) == 12 && offsetof(shm::SubmitEntry, flags) == 14 &&
              offsetof(shm::SubmitEntry, request_bytes) == 16 &&
              offsetof(shm::SubmitEntry, generation) == 24 &&
              offsetof(shm::SubmitEntry, reserved) == 28);
static_assert(offsetof(shm::SlotHeader, done) == 64 && offsetof(shm::SlotHeader, status) == 68);
constexpr uint32_t kPodWords = sizeof(shm::AttendAnswerPod) / 4;
static_assert(offsetof(shm::AttendAnswerPod, status) == 0 &&
              offsetof(shm::AttendAnswerPod, generation) == 4);

struct RingArgs {
  RungLayout layout;
  RungMessage message;
  const RungMessage* at;  // null: `message` and `before_generation` count
  const std::byte *head, *q, *k, *v;
  const uint32_t* before;  // `done` of the message before; null: there is none
  uint32_t before_generation;
  uint32_t* arrived;
};

struct AnswerArgs {
  RungLayout layout;
  const std::byte* slot;
  const RungMessage* at;  // null: `generation` counts
  uint32_t generation;
  float *o, *lse, *far_lse;
  uint32_t* outcome;  // `done`, the message's status, the rows' pods
};

template <typename Unit>
__device__ void CopyUnits(std::byte* to, const std::byte* from, uint64_t bytes) {
  for (uint64_t i = threadIdx.x; i < bytes / sizeof(Unit); i += kThreads) {
    reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
  }
}

// `to` is a multiple of 16.
__device__ void CopyBlock(std::byte* to, const std::byte* from, uint64_t bytes) {
  const uint64_t all = reinterpret_cast<uint64_t>(from) | bytes;
  if (all % 16 == 0) {
    CopyUnits<uint4>(to, from, bytes);
  } else if (all % 4 == 0) {
    CopyUnits<uint32_t>(to, from, bytes);
  } else {
    CopyUnits<char>(to, from, bytes);
  }
}

__device__ void Submit(const RungMessage& m) {
  auto* const entry = reinterpret_cast<volatile uint64_t*>(m.entry);
  entry[1] = m.slot_index | uint64_t{static_cast<uint16_t>(shm::Opcode::kAttend)} << 32;
  entry[2] = m.request_bytes;
  entry[3] = m.generation;
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(m.entry), "l"(m.sequence) : "memory");
}

// A block for a row; the last to be done submits.
__global__ void __launch_bounds__(kThreads) Ring(const __grid_constant__ RingArgs a) {
  if (a.before != nullptr) {
    const uint32_t answered = a.at != nullptr ? a.at[-1].generation : a.before_generation;
    if (*a.before != answered) return;  // it was given up
  }
  const RungLayout& layout = a.layout;
  const uint64_t row = blockIdx.x;
  const uint64_t q_bytes = uint64_t{layout.heads} * layout.head_dim * sizeof(float);
  std::byte* const to = a.message.slot + row * layout.row_stride;
  if (row == 0) {  // its pieces are multiples of 8 bytes behind a multiple of 64
    CopyUnits<uint64_t>(a.message.slot + shm::kSlotPayload, a.head, layout.head_bytes);
  }
  CopyBlock(to + layout.q, a.q + row * q_bytes, q_bytes);
  CopyBlock(to + layout.k, a.k + row * layout.kv_bytes, layout.kv_bytes);
  CopyBlock(to + layout.v, a.v + row * layout.kv_bytes, layout.kv_bytes);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0 || atomicInc(a.arrived, gridDim.x - 1) != gridDim.x - 1) return;
  __threadfence_system();  // what other blocks wrote, too
  Submit(a.at != nullptr ? *a.at : a.message);
}

// Keeps what was answered, but for the vectors. One block: reads of one line of the host by many
// warps come one after the other, a microsecond or more each.
__global__ void __launch_bounds__(kThreads) SeeAnswer(const __grid_constant__ AnswerArgs a) {
  const auto* const header = reinterpret_cast<const volatile uint32_t*>(a.slot);
  const auto* const pods = reinterpret_cast<const volatile uint32_t*>(a.slot + shm::kSlotPayload);
  for (uint32_t i = threadIdx.x; i < 2 + a.layout.rows * kPodWords; i += kThreads) {
    a.outcome[i] = i < 2 ? header[offsetof(shm::SlotHeader, done) / 4 + i] : pods[i - 2];
  }
  for (uint32_t i = threadIdx.x; i < a.layout.rows * a.layout.heads; i += kThreads) {
    const uint32_t row = i / a.layout.heads, head = i % a.layout.heads;
    const std::byte* const lse = a.slot + row * a.layout.row_stride + a.layout.lse;
    a.far_lse[i] = reinterpret_cast<const volatile float*>(lse)[head];
  }
}

// A warp for a row's head.
__global__ void __launch_bounds__(kThreads) TakeAnswer(const __grid_constant__ AnswerArgs a) {
  const RungLayout& layout = a.layout;
  const uint32_t vector = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (vector >= layout.rows * layout.heads) return;
  const uint32_t row = vector / layout.heads, head = vector % layout.heads;
  const uint32_t* const pod = a.outcome + 2 + row * kPodWords;
  const uint32_t generation = a.at != nullptr ? a.at->generation : a.generation;
  if (a.outcome[0] != generation || pod[1] != generation || a.outcome[1] != 0 || pod[0] != 0) {
    return;
  }
  const uint32_t lane = threadIdx.x % kWarp;
  const std::byte* const from = a.slot + row * layout.row_stride;
  const auto* const far_o =
      reinterpret_cast<const volatile float*>(from + layout.o) + head * layout.head_dim;
  float ahead[kAhead];
#pragma unroll
  for (uint32_t i = 0; i < kAhead; ++i) {
    ahead[i] = lane + i * kWarp < layout.head_dim ? far_o[lane + i * kWarp] : 0.0f;
  }
  float* const o = a.o + size_t{vector} * layout.head_dim;
  const MergeWeights merge(a.lse[vector], a.far_lse[vector]);
  if (merge.nothing()) return;
#pragma unroll
  for (uint32_t i = 0; i < kAhead; ++i) {
    const uint32_t at = lane + i * kWarp;
    if (at < layout.head_dim) o[at] = merge.Of(o[at], ahead[i]);
  }
  for (uint32_t at = lane + kAhead * kWarp; at < layout.head_dim; at += kWarp) {
    o[at] = merge.Of(o[at], far_o[at]);
  }
  __syncwarp();  // all lanes have read lse
  if (lane == 0) a.lse[vector] = merge.lse();
}

}  // namespace

cudaError_t PrepareRingKernels() {
  for (const cudaError_t error :
       {LoadKernel(Ring), LoadKernel(SeeAnswer), LoadKernel(TakeAnswer)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchRing(const DeviceRing& ring, uint32_t* arrived, cudaStream_t stream) {
  RingArgs args = {};
  args.layout = ring.layout;
  args.message = ring.message;
  args.at = ring.at;
  args.head = static_cast<const std::byte*>(ring.head);
  args.q = reinterpret_cast<const std::byte*>(ring.q);
  args.k = static_cast<const std::byte*>(ring.k);
  args.v = static_cast<const std::byte*>(ring.v);
  args.before = static_cast<const uint32_t*>(ring.before);
  args.before_generation = ring.before_generation;
  args.arrived = arrived;
  Ring<<<ring.layout.rows, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchTakeAnswer(const DeviceRing& ring, cudaStream_t stream) {
  AnswerArgs args = {};
  args.layout = ring.layout;
  args.slot = ring.message.slot;
  args.at = ring.at;
  args.generation = ring.message.generation;
  args.o = ring.o;
  args.lse = ring.lse;
  args.far_lse = ring.far_lse;
  args.outcome = static_cast<uint32_t*>(ring.outcome);
  constexpr uint32_t kVectors = kThreads / kWarp;
  const uint32_t vectors = ring.layout.rows * ring.layout.heads;
  SeeAnswer<<<1, kThreads, 0, stream>>>(args);
  TakeAnswer<<<(vectors + kVectors - 1) / kVectors, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quarry::cuda
