// Attention over an index on the host: the reference for kernels, and what machines without an
// accelerator run.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_index.h"
#include "gpu/thread_team.h"

namespace quarry {

// Causal attention of some of an index's rows over one layer's K and V, all heads, of any kinds.
struct SparseAttention {
  LayerKv layer;
  const SparseIndex* index = nullptr;
  std::span<const uint32_t> tokens;  // of the rows, rising; none: all of the index's rows
  const float* q = nullptr;          // [rows][heads][head_dim], of the rows that are attended
  float* o = nullptr;                // the same; overwritten
  float* lse = nullptr;              // [rows][heads], natural; overwritten
};

// What was attended.
struct SparseWork {
  uint64_t tiles = 0;  // key tiles of the row tiles that have rows, as a kernel runs them
  uint64_t keys = 0;   // read, over heads and row tiles; without columns that ranges have
};

// A row tile of one head is one thread's work; memory: the columns' K and V once per head, some 200
// KiB per thread. Each row always attends itself, so that no lse is infinite.
SparseWork AttendSparse(const SparseAttention& attention, ThreadTeam* team);

}  // namespace quarry
