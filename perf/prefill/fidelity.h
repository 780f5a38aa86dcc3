// Exact attention of some of a made layer's rows, and what a device's answers have of it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/captured.h"
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

Fidelity Of(std::span<const CapturedSums> heads);

// Dense attention of sampled rows by the host's scan, in fp32 with sums that are merged every 8,192
// keys: its errors are near 1e-6, those of two-byte arithmetic near 1e-3.
class ExactRows {
 public:
  // tokens: rising. O(tokens.size() * tokens of the layer * heads * head_dim). The layer outlives
  // it.
  ExactRows(const MadeLayer& layer, std::span<const MadeHead> kinds, std::vector<uint32_t> tokens,
            ThreadTeam* team);
  ExactRows(const ExactRows&) = delete;  // its meter reads what is here
  ExactRows& operator=(const ExactRows&) = delete;

  std::span<const uint32_t> tokens() const { return tokens_; }
  // By tokens()' places.
  const CaptureMeter& meter() const { return meter_; }

 private:
  const std::vector<uint32_t> tokens_;
  const std::vector<float> q_;  // [tokens][heads][head_dim]
  const CaptureMeter meter_;
};

}  // namespace quarry::perf
