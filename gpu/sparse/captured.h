// How much of dense attention an index has, on sampled rows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_index.h"
#include "gpu/thread_team.h"

namespace quarry {

// Of one head.
struct Captured {
  double mass = 1;        // the softmax mass of the attended keys, mean over rows
  double least_mass = 1;  // of any row
  double error = 0;       // |o_sparse - o_dense| / |o_dense|, root mean squares over rows
};

// Sums over rows that such shares are made of.
struct CapturedSums {
  double mass = 0, least_mass = 1, error2 = 0, length2 = 0;
  uint64_t rows = 0;
};

// Dense attention of sampled rows, and what indexes of the same layer have of it.
class CaptureMeter {
 public:
  // Rows `tokens`, rising, of `rows`; q: [tokens][heads][head_dim]. All outlive it.
  // O(tokens * n * heads) at once, and as much per index as it attends.
  CaptureMeter(const LayerKv& layer, TokenRange rows, std::span<const uint32_t> tokens,
               const float* q, ThreadTeam* team);

  // [heads]. The index is of rows that have all of `tokens`.
  std::vector<Captured> Measure(const SparseIndex& index, ThreadTeam* team) const;
  // Adds what an answer to row tokens[row] of all heads has: o [heads][head_dim], lse [heads]
  // natural. sums: [heads]
  void Add(size_t row, std::span<const float> o, std::span<const float> lse,
           std::span<CapturedSums> sums) const;

 private:
  const LayerKv layer_;
  const std::span<const uint32_t> tokens_;
  const float* const q_;
  std::vector<float> o_, lse_;  // dense
};

}  // namespace quarry
