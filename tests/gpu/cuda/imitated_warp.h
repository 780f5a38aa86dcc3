// The operations of gpu/cuda/warp_ops.cuh on the host, for tests of kernels where there is no
// card: a block's threads are fibers of one thread of the host, and an operation of a warp is done
// by the last of its lanes to arrive. Copies happen when they are asked for or when they are waited
// for, at random: nobody may count on either.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "proto/check.h"
#include "proto/half.h"

#define __device__
#define __shared__ static  // blocks run one after the other

namespace quarry::cuda {

using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, gridDim;

// The threads of one block, run to their end.
class ImitatedBlock {
 public:
  static constexpr int kLanes = 32;

  // The block that runs now.
  static ImitatedBlock*& Current() {
    static ImitatedBlock* current = nullptr;
    return current;
  }

  ImitatedBlock(int threads, uint64_t seed) : random_(seed), threads_(static_cast<size_t>(threads)) {
    warps_.resize((threads_.size() + kLanes - 1) / kLanes);
  }

  void Run(const std::function<void()>& body) {
    Current() = this;
    body_ = &body;
    for (size_t t = 0; t < threads_.size(); ++t) {
      Thread& thread = threads_[t];
      thread.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &ImitatedBlock::Enter, 0);
    }
    left_ = threads_.size();
    now_ = 0;
    threadIdx.x = 0;
    swapcontext(&outside_, &threads_[0].context);
    Current() = nullptr;
  }

  // `operation` runs once, when all lanes of this thread's warp have come, each with `mine`:
  // operation(all), by lane.
  template <typename Mine, typename F>
  void WithWarp(Mine* mine, const F& operation) {
    Warp& warp = warps_[now_ / kLanes];
    warp.mine[now_ % kLanes] = mine;
    Meet(&warp.meeting, kLanes, [&] {
      Mine* all[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) all[lane] = static_cast<Mine*>(warp.mine[lane]);
      operation(all);
    });
  }

  void Synchronize() {
    Meet(&all_, threads_.size(), [] {});
  }

  void CopyLater(void* to, const void* from, bool exists) {
    Later({to, exists ? from : nullptr, 16});
  }
  void CopyEightLater(void* to, const void* from) { Later({to, from, 8}); }
  void EndCopyGroup() {
    threads_[now_].groups.push_back(std::move(threads_[now_].open));
    threads_[now_].open.clear();
  }
  void WaitForCopies(size_t pending) {
    auto& groups = threads_[now_].groups;
    while (groups.size() > pending) {
      for (const Copy& copy : groups.front()) copy.Do();
      groups.erase(groups.begin());
    }
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
    void Do() const {
      if (from != nullptr) {
        std::memcpy(to, from, bytes);
      } else {
        std::memset(to, 0, bytes);
      }
    }
  };
  struct Thread {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack;
    bool ended = false;
    std::vector<Copy> open;                 // of the group that has not ended
    std::vector<std::vector<Copy>> groups;  // ended, not waited for
  };
  struct Meeting {
    size_t came = 0, round = 0;
  };
  struct Warp {
    Meeting meeting;
    void* mine[kLanes] = {};
  };

  void Later(const Copy& copy) {
    QUARRY_CHECK(reinterpret_cast<uintptr_t>(copy.to) % copy.bytes == 0);
    QUARRY_CHECK(reinterpret_cast<uintptr_t>(copy.from) % copy.bytes == 0);
    if (random_() % 2 == 0) {
      copy.Do();
    } else {
      threads_[now_].open.push_back(copy);
    }
  }

  static void Enter() {
    ImitatedBlock* const block = Current();
    (*block->body_)();
    block->threads_[block->now_].ended = true;
    --block->left_;
    block->Next();
  }

  template <typename F>
  void Meet(Meeting* meeting, size_t all, const F& last) {
    const size_t round = meeting->round;
    if (++meeting->came == all) {
      last();
      meeting->came = 0;
      ++meeting->round;
      return;
    }
    size_t turns = 0;
    while (meeting->round == round) {
      QUARRY_CHECK(++turns < 1'000'000);  // somebody never comes
      Next();
    }
  }

  // To the next thread that has not ended, or out.
  void Next() {
    const size_t from = now_;
    if (left_ == 0) {
      swapcontext(&threads_[from].context, &outside_);
    }
    do {
      now_ = (now_ + 1) % threads_.size();
    } while (threads_[now_].ended);
    if (now_ == from) return;
    threadIdx.x = static_cast<uint32_t>(now_);
    swapcontext(&threads_[from].context, &threads_[now_].context);
  }

  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Meeting all_;
  ucontext_t outside_;
  const std::function<void()>* body_ = nullptr;
  size_t left_ = 0, now_ = 0;
};

inline void __syncthreads() { ImitatedBlock::Current()->Synchronize(); }
inline void CopyLater(void* shared, const void* global, bool exists) {
  ImitatedBlock::Current()->CopyLater(shared, global, exists);
}
inline void CopyEightLater(void* shared, const void* global) {
  ImitatedBlock::Current()->CopyEightLater(shared, global);
}
inline void EndCopyGroup() { ImitatedBlock::Current()->EndCopyGroup(); }
template <int kPending>
void WaitForCopies() {
  ImitatedBlock::Current()->WaitForCopies(kPending);
}

// Of memory that nobody writes.
inline uint4 LoadOnce(const void* global) {
  QUARRY_CHECK(reinterpret_cast<uintptr_t>(global) % 16 == 0);
  uint4 x;
  std::memcpy(&x, global, sizeof(x));
  return x;
}
inline uint32_t WordOf(const uint4& x, int i) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  return words[i];
}
inline float ByteLess128(uint32_t x, int i) {
  return static_cast<float>(static_cast<int>(x >> (8 * i) & 255) - 128);
}
inline float Bf16AsFloat(uint16_t x) { return Bf16ToFloat(x); }

inline void Forget(int&) {}

inline float Exp2(float x) { return std::exp2(x); }

template <typename F>
float OfQuad(float x, const F& f) {
  struct Mine {
    float x;
  } mine{x};
  ImitatedBlock::Current()->WithWarp(&mine, [&](Mine** all) {
    for (int lane = 0; lane < 32; lane += 4) {
      const float y = f(f(all[lane]->x, all[lane + 1]->x), f(all[lane + 2]->x, all[lane + 3]->x));
      for (int i = 0; i < 4; ++i) all[lane + i]->x = y;
    }
  });
  return mine.x;
}
inline float QuadMax(float x) {
  return OfQuad(x, [](float a, float b) { return std::fmax(a, b); });
}
inline float QuadSum(float x) {
  return OfQuad(x, [](float a, float b) { return a + b; });
}

inline uint32_t OrOfRows(uint32_t x) {
  struct Mine {
    uint32_t x, all;
  } mine{x, 0};
  ImitatedBlock::Current()->WithWarp(&mine, [](Mine** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = lane % 4; i < 32; i += 4) all[lane]->all |= all[i]->x;
    }
  });
  return mine.all;
}
inline uint32_t Ballot(bool x) {
  struct Mine {
    bool x;
    uint32_t all;
  } mine{x, 0};
  ImitatedBlock::Current()->WithWarp(&mine, [](Mine** all) {
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) bits |= uint32_t{all[lane]->x} << lane;
    for (int lane = 0; lane < 32; ++lane) all[lane]->all = bits;
  });
  return mine.all;
}
inline uint32_t MatchLanes(uint32_t x) {
  struct Mine {
    uint32_t x, same;
  } mine{x, 0};
  ImitatedBlock::Current()->WithWarp(&mine, [](Mine** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (uint32_t i = 0; i < 32; ++i) {
        all[lane]->same |= uint32_t{all[i]->x == all[lane]->x} << i;
      }
    }
  });
  return mine.same;
}
template <typename X>
X ShuffleUp(X x, uint32_t step) {
  struct Mine {
    X x, got;
  } mine{x, x};
  ImitatedBlock::Current()->WithWarp(&mine, [step](Mine** all) {
    for (uint32_t lane = step; lane < 32; ++lane) all[lane]->got = all[lane - step]->x;
  });
  return mine.got;
}
inline void SyncWarp() {
  int none = 0;
  ImitatedBlock::Current()->WithWarp(&none, [](int**) {});
}
// Threads take turns only where they meet.
inline void AddShared(uint32_t* to, uint32_t x) { *to += x; }
inline void AddShared(uint64_t* to, uint64_t x) { *to += x; }
inline void OrShared(uint32_t* to, uint32_t x) { *to |= x; }

inline uint32_t BitsOf(float x) { return std::bit_cast<uint32_t>(x); }
inline float FloatOf(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t RoundToWhole(float x) { return static_cast<uint32_t>(std::llrint(x)); }
inline uint32_t CountBits(uint32_t x) { return static_cast<uint32_t>(std::popcount(x)); }
inline uint32_t FirstBit(uint32_t x) { return static_cast<uint32_t>(std::countr_zero(x)); }
inline uint32_t LastBit(uint32_t x) { return 31 - static_cast<uint32_t>(std::countl_zero(x)); }

// As PTX's ldmatrix.m8n8.x4.b16 lays it out. The rows of a matrix lie in different banks, else the
// card would take longer; shared memory begins at a multiple of 128 bytes.
template <bool kTransposed>
void ImitateLoad(uint32_t out[4], const void* row) {
  struct Mine {
    uint32_t* out;
    const void* row;
  } mine{out, row};
  QUARRY_CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0);
  ImitatedBlock::Current()->WithWarp(&mine, [](Mine** all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const void* const row = all[8 * matrix + r]->row;
        std::memcpy(values[r], row, 16);
        banks |= 1u << reinterpret_cast<uintptr_t>(row) / 16 % 8;
      }
      QUARRY_CHECK(banks == 0xff);
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = 2 * (lane % 4);
        const uint32_t lo = kTransposed ? values[c][r] : values[r][c];
        const uint32_t hi = kTransposed ? values[c + 1][r] : values[r][c + 1];
        all[lane]->out[matrix] = lo | hi << 16;
      }
    }
  });
}
inline void LoadMatrices(uint32_t out[4], const void* row) { ImitateLoad<false>(out, row); }
inline void LoadTransposed(uint32_t out[4], const void* row) { ImitateLoad<true>(out, row); }

// As PTX's mma.m16n8k16 lays operands of two bytes out.
template <DType kDType>
struct Element {
  static uint32_t LessEight(uint32_t x) {
    return Pack(static_cast<float>(static_cast<int>(x & 15) - 8),
                static_cast<float>(static_cast<int>(x >> 16 & 15) - 8));
  }
  static uint32_t Pack(float lo, float hi) {
    uint16_t both[2];
    StoreFromFloat(both, 0, kDType, lo);
    StoreFromFloat(both, 1, kDType, hi);
    return both[0] | uint32_t{both[1]} << 16;
  }
  static float2 Unpack(uint32_t both) {
    return {LoadAsFloat(&both, 0, kDType), LoadAsFloat(&both, 1, kDType)};
  }
  static void Multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    struct Mine {
      float* c;
      const uint32_t* a;
      uint32_t b[2];
    } mine{c, a, {b0, b1}};
    ImitatedBlock::Current()->WithWarp(&mine, [](Mine** all) {
      float x[16][16], y[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, column = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) {
          for (int e = 0; e < 2; ++e) {
            x[group + 8 * (i % 2)][column + e + 8 * (i / 2)] =
                LoadAsFloat(&all[lane]->a[i], static_cast<size_t>(e), kDType);
          }
        }
        for (int i = 0; i < 2; ++i) {
          for (int e = 0; e < 2; ++e) {
            y[column + e + 8 * i][group] =
                LoadAsFloat(&all[lane]->b[i], static_cast<size_t>(e), kDType);
          }
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
          float sum = all[lane]->c[i];
          for (int k = 0; k < 16; ++k) sum += x[row][k] * y[k][column];
          all[lane]->c[i] = sum;
        }
      }
    });
  }
};
using Bf16 = Element<DType::kBf16>;
using Fp16 = Element<DType::kFp16>;

}  // namespace quarry::cuda
