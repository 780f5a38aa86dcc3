// What the kernel for Hopper asks of the machine beside warp_ops.cuh: barriers in shared memory,
// copies of tiles by tensor maps, matrix instructions of a warpgroup. One thin function per
// instruction (sm_90a).
#pragma once

#include <cuda.h>

#include <type_traits>

#include "gpu/cuda/warp_ops.cuh"

namespace quarry::cuda {

// A barrier in shared memory: a phase ends when `arrivals` have come and all bytes that were
// announced are there.
using Barrier = uint64_t;

__device__ inline void InitBarrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
// Copies see the barriers that were made before.
__device__ inline void FenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void Arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}
__device__ inline void ArriveExpecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended. Before the first one the other parity has. A thread
// that waits is put aside for so long, rather than taking others' turns with its questions.
__device__ inline void Wait(Barrier* barrier, uint32_t parity) {
  constexpr uint32_t kLongestNs = 10'000'000;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(SharedAddress(barrier)),
      "r"(parity), "r"(kLongestNs)
      : "memory");
}

// Barriers of threads by number, 1 to 15: `threads` come in all, those that wait among them.
__device__ inline void WaitForThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void ArriveForThreads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A box of a tensor map of three dimensions to shared memory, its bytes announced to the barrier.
__device__ inline void CopyTile(void* shared, const CUtensorMap* map, int x, int y, int z,
                                Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(SharedAddress(barrier))
      : "memory");
}
// To the L2 cache.
__device__ inline void PrefetchLine(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)) : "memory");
}
// What this thread has written to shared memory is seen by copies and matrix instructions that
// come after a barrier.
__device__ inline void FenceShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before products that use registers which other instructions wrote.
__device__ inline void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ inline void EndProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all but the latest `kPending` groups.
template <int kPending>
__device__ inline void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler keeps what is done to these registers on its side of this point.
template <typename T, int kCount>
__device__ inline void Pin(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// The registers of accumulators in an instruction's text, and as its operands.
#define QUARRY_NAMES_32                                                                            \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define QUARRY_NAMES_48 \
  QUARRY_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QUARRY_NAMES_64 \
  QUARRY_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QUARRY_OPERANDS_8(c, i)                                                               \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define QUARRY_OPERANDS_32(c)                                                 \
  QUARRY_OPERANDS_8(c, 0), QUARRY_OPERANDS_8(c, 8), QUARRY_OPERANDS_8(c, 16), \
      QUARRY_OPERANDS_8(c, 24)
#define QUARRY_OPERANDS_48(c) \
  QUARRY_OPERANDS_32(c), QUARRY_OPERANDS_8(c, 32), QUARRY_OPERANDS_8(c, 40)
#define QUARRY_OPERANDS_64(c) \
  QUARRY_OPERANDS_48(c), QUARRY_OPERANDS_8(c, 48), QUARRY_OPERANDS_8(c, 56)

// c [64][128] = a [64][16] * b [128][16]^T, plus c if `adds`; a and b in shared memory as their
// descriptors say, a dimension's elements behind one another. Lane l of warp w has, of columns
// 8 j + 2 * (l % 4) and the next, row 16 w + l / 4 at c[4 j] and row 16 w + l / 4 + 8 at
// c[4 j + 2].
#define QUARRY_MULTIPLY_SHARED(type)                                                    \
  asm volatile(                                                                         \
      "{\n"                                                                             \
      ".reg .pred adds;\n"                                                              \
      "setp.ne.b32 adds, %66, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" QUARRY_NAMES_64 \
      "}, %64, %65, adds, 1, 1, 0, 0;\n"                                                \
      "}"                                                                               \
      : QUARRY_OPERANDS_64(c)                                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))
template <typename T>
__device__ void MultiplyShared(float (&c)[64], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<T, Bf16>) {
    QUARRY_MULTIPLY_SHARED("bf16");
  } else {
    QUARRY_MULTIPLY_SHARED("f16");
  }
}
#undef QUARRY_MULTIPLY_SHARED

// c [64][2 kCount] = a [64][16] * b [16][2 kCount], plus c if `adds`; a in registers as Multiply of
// a warp wants it, b in shared memory with the elements of a key behind one another.
#define QUARRY_MULTIPLY_HELD(type, columns, count, a0, a1, a2, a3, b0, p)  \
  asm volatile(                                                            \
      "{\n"                                                                \
      ".reg .pred adds;\n"                                                 \
      "setp.ne.b32 adds, " p                                               \
      ", 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
      " {" QUARRY_NAMES_##count "}, {" a0 "," a1 "," a2 "," a3 "}, " b0    \
                                ", adds, 1, 1, 1;\n"                       \
                                "}"                                        \
      : QUARRY_OPERANDS_##count(c)                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)))
#define QUARRY_MULTIPLY_HELD_OF(type)                                                \
  if constexpr (kCount == 32) {                                                      \
    QUARRY_MULTIPLY_HELD(type, "64", 32, "%32", "%33", "%34", "%35", "%36", "%37");  \
  } else if constexpr (kCount == 48) {                                               \
    QUARRY_MULTIPLY_HELD(type, "96", 48, "%48", "%49", "%50", "%51", "%52", "%53");  \
  } else {                                                                           \
    static_assert(kCount == 64);                                                     \
    QUARRY_MULTIPLY_HELD(type, "128", 64, "%64", "%65", "%66", "%67", "%68", "%69"); \
  }
template <typename T, int kCount>
__device__ void MultiplyHeld(float (&c)[kCount], const uint32_t* a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<T, Bf16>) {
    QUARRY_MULTIPLY_HELD_OF("bf16")
  } else {
    QUARRY_MULTIPLY_HELD_OF("f16")
  }
}
#undef QUARRY_MULTIPLY_HELD_OF
#undef QUARRY_MULTIPLY_HELD
#undef QUARRY_OPERANDS_64
#undef QUARRY_OPERANDS_48
#undef QUARRY_OPERANDS_32
#undef QUARRY_OPERANDS_8
#undef QUARRY_NAMES_64
#undef QUARRY_NAMES_48
#undef QUARRY_NAMES_32

}  // namespace quarry::cuda
