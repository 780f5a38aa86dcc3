// What kernels of tensors and of choices ask of the machine: matrix instructions, asynchronous
// copies, conversions, what a warp does together. One thin function per instruction (sm_80 and
// later).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quarry::cuda {

// c [16][8] += a [16][16] * b [16][8], operands of two bytes as the instruction wants them spread
// over a warp's lanes: lane l has c of rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next.
struct Bf16 {
  // Nibbles 0 and 4 of x, less 8.
  static __device__ uint32_t LessEight(uint32_t x) {
    const uint32_t both = (x & 0x000f000fu) | 0x43004300u, middle = 0x43084308u;  // 128 +, 136
    const __nv_bfloat162 y = __hsub2(reinterpret_cast<const __nv_bfloat162&>(both),
                                     reinterpret_cast<const __nv_bfloat162&>(middle));
    return reinterpret_cast<const uint32_t&>(y);
  }
  static __device__ uint32_t Pack(float lo, float hi) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(both);
  }
  static __device__ float2 Unpack(uint32_t both) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
  }
  static __device__ void Multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Fp16 {
  static __device__ uint32_t LessEight(uint32_t x) {
    const uint32_t both = (x & 0x000f000fu) | 0x64006400u, middle = 0x64086408u;  // 1024 +, 1032
    const __half2 y =
        __hsub2(reinterpret_cast<const __half2&>(both), reinterpret_cast<const __half2&>(middle));
    return reinterpret_cast<const uint32_t&>(y);
  }
  static __device__ uint32_t Pack(float lo, float hi) {
    const __half2 both = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(both);
  }
  static __device__ float2 Unpack(uint32_t both) {
    return __half22float2(reinterpret_cast<const __half2&>(both));
  }
  static __device__ void Multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of two-byte elements from shared memory: lanes 8 i to 8 i + 7 name the rows
// of matrix i, 16 bytes each; lane l gets elements 2 * (l % 4) and the next of row l / 4.
__device__ inline void LoadMatrices(uint32_t out[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// The same, each matrix transposed.
__device__ inline void LoadTransposed(uint32_t out[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// Copies 16 bytes to shared memory behind the thread's back; zeros, reading nothing, unless
// `exists`. Both addresses are multiples of 16.
__device__ inline void CopyLater(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(exists ? 16 : 0)
               : "memory");
}
// The same of 8 bytes that exist, both addresses multiples of 8.
__device__ inline void CopyEightLater(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(SharedAddress(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
// Ends a group of copies, also an empty one.
__device__ inline void EndCopyGroup() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, but for those of the latest `kPending` groups.
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes, at a multiple of 16, that nobody writes and that are read once.
__device__ inline uint4 LoadOnce(const void* global) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(global)));
  return x;
}
__device__ inline uint32_t WordOf(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}
// Byte i of x, less 128.
__device__ inline float ByteLess128(uint32_t x, int i) {
  const uint32_t bits = __byte_perm(x, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i));  // 2^23 +
  return __uint_as_float(bits) - 8388736.0f;
}
__device__ inline float Bf16AsFloat(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }

// What the compiler knew of x, and computed from it, is good no more.
__device__ inline void Forget(int& x) { asm volatile("" : "+r"(x)); }

// 2^x to 2 ulp; 2^-infinity is 0.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that share rows of a product.
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
// Over the lanes that have the same columns of a product: of all its rows.
__device__ inline uint32_t OrOfRows(uint32_t x) {
  x |= __shfl_xor_sync(0xffffffffu, x, 4);
  x |= __shfl_xor_sync(0xffffffffu, x, 8);
  return x | __shfl_xor_sync(0xffffffffu, x, 16);
}

// Of all lanes of a warp: those for which x holds; those with the same x.
__device__ inline uint32_t Ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
__device__ inline uint32_t MatchLanes(uint32_t x) { return __match_any_sync(0xffffffffu, x); }
// From the lane that is `step` before; the first ones keep theirs.
template <typename X>
__device__ X ShuffleUp(X x, uint32_t step) {
  return __shfl_up_sync(0xffffffffu, x, step);
}
__device__ inline void SyncWarp() { __syncwarp(); }

// Change shared memory that other threads change, too.
__device__ inline void AddShared(uint32_t* to, uint32_t x) { atomicAdd(to, x); }
__device__ inline void AddShared(uint64_t* to, uint64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}
__device__ inline void OrShared(uint32_t* to, uint32_t x) { atomicOr(to, x); }

__device__ inline uint32_t BitsOf(float x) { return __float_as_uint(x); }
__device__ inline float FloatOf(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t RoundToWhole(float x) { return __float2uint_rn(x); }
__device__ inline uint32_t CountBits(uint32_t x) {
  return static_cast<uint32_t>(__popc(static_cast<int>(x)));
}
// Of x that is not 0.
__device__ inline uint32_t FirstBit(uint32_t x) {
  return static_cast<uint32_t>(__ffs(static_cast<int>(x))) - 1;
}
__device__ inline uint32_t LastBit(uint32_t x) {
  return 31 - static_cast<uint32_t>(__clz(static_cast<int>(x)));
}

}  // namespace quarry::cuda
