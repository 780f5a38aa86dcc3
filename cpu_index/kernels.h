// The inner loops of attention over keys and values, one table per instruction set. Plain data
// only: the level files include this and intrinsics, nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quarry::kernels {

// Element types of K and V; the values of DType.
inline constexpr uint8_t kBf16 = 1, kFp16 = 2, kFp32 = 3;

// Scores of a tile: out[i * ld_out + t] = q_i . k_t * scale, clamped to finite floats.
struct ScoreTile {
  const float* q;          // [queries][head_dim]
  const uint16_t* q_bf16;  // the same queries, if they are exactly bf16; else null
  uint32_t queries;
  uint32_t head_dim;       // a multiple of 16
  const void* k;           // [tokens][head_dim] of dtype
  uint32_t tokens;
  uint8_t dtype;
  float scale;
  float* out;
  size_t ld_out;           // in floats
  // Where the keys go on after this tile, for prefetching; may be null.
  const void* next;
};

// acc[i * head_dim + d] += sum over t of p[i * ld_p + t] * v[row(t) * head_dim + d], with
// row(t) = rows ? rows[t] : t.
struct AccumulateTile {
  const float* p;
  size_t ld_p;
  uint32_t queries;
  uint32_t head_dim;
  const void* v;
  const uint32_t* rows;
  uint32_t tokens;
  uint8_t dtype;
  float* acc;
  const void* next;      // as in ScoreTile
};

struct Table {
  const char* name;
  void (*score)(const ScoreTile&);
  void (*accumulate)(const AccumulateTile&);
  float (*max)(const float* x, size_t n);                 // -infinity for n = 0
  float (*exp_sum)(float* x, size_t n, float shift);      // x = e^(x - shift) in place; their sum
  void (*scale)(float* x, size_t n, float factor);
};

// Each defined in its own file, compiled for that instruction set alone.
const Table& ScalarTable();
const Table& Avx2Table();
const Table& Avx512Table();
const Table& AmxTable();

}  // namespace quarry::kernels
