// Exact attention of some of a made layer's rows, and what a device's answers have of it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/thread_team.h"
#include "perf/prefill/made_layer.h"

namespace quarry::perf {

// Over rows and heads.
struct Fidelity {
  double mass = 1;        // the softmax mass of what was attended, mean
  double least_mass = 1;  // of any row and head
  double error = 0;       // |o - o_exact| / |o_exact|, root mean squares
  uint64_t answers = 0;   // rows * heads; 0: the rest says nothing
};

// Sums that a Fidelity is made of, for one head.
struct HeadFidelity {
  double mass = 0, least_mass = 1, error2 = 0, length2 = 0;
  uint64_t rows = 0;
};
Fidelity Of(std::span<const HeadFidelity> heads);

// Dense attention of sampled rows by the host's scan, in fp32 with sums that are merged every 8,192
// keys: its errors are near 1e-6, those of two-byte arithmetic near 1e-3.
class ExactRows {
 public:
  // tokens: rising. O(tokens.size() * tokens of the layer * heads * head_dim). The layer outlives
  // it.
  ExactRows(const MadeLayer& layer, std::span<const MadeHead> kinds, std::vector<uint32_t> tokens,
            ThreadTeam* team);

  std::span<const uint32_t> tokens() const { return tokens_; }
  // Adds an answer to row tokens()[row] of all heads: o [heads][head_dim], lse [heads] natural.
  // sums: [heads]
  void Compare(size_t row, std::span<const float> o, std::span<const float> lse,
               std::span<HeadFidelity> sums) const;

 private:
  const MadeLayer& layer_;
  const std::vector<uint32_t> tokens_;
  std::vector<float> o_, lse_;
};

}  // namespace quarry::perf
