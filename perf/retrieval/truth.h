// The exact answer to a query in double, and what an approximate one is worth beside it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "proto/types.h"

namespace quarry::perf {

// The worker's own part of a context: its first and its last tokens; the daemon has the rest.
struct Window {
  uint32_t first = 128;
  uint32_t last = 512;
  // What is retrieved from, of `visible` tokens.
  TokenRange Rest(uint32_t visible) const {
    return {first, visible > first + last ? visible - last : first};
  }
};

// One KV head widened to fp32: [tokens][head_dim].
struct WideHead {
  const float* k = nullptr;
  const float* v = nullptr;
  uint32_t head_dim = 0;
};

// The fewest best tokens with which the error is at most `error`.
struct OraclePoint {
  uint32_t tokens = 0;
  double error = 0;    // after the merge with the window
  double partial = 0;  // before it
};

// One query head at one position. z = q.k * scale; the rest is what the window leaves.
struct QueryTruth {
  TokenRange rest;
  std::vector<double> window_o, rest_o, full_o;  // [head_dim]
  double window_lse = 0, rest_lse = 0;           // -infinity for no tokens
  std::vector<float> log_share;                  // [rest] z - rest_lse: the log of its mass
  std::vector<uint32_t> best;                    // the best 100 tokens of the rest, or all
  std::vector<uint32_t> order;                   // tokens of the rest, best first, as far as
                                                 // the oracle goes
  std::vector<OraclePoint> oracle;               // rising tokens, falling errors
};

// Tokens [0, visible) of the head; q [head_dim]. Errors of the oracle are known for each of its
// first 1,024 tokens, then in steps of 1/256. Cost: two passes over keys and values, and a sort.
QueryTruth ComputeTruth(const WideHead& head, std::span<const float> q, double scale,
                        uint32_t visible, const Window& window);

// Log of the length of the sum of e^score * value over the window's tokens; -infinity for none.
float WindowLength(const WideHead& head, std::span<const float> q, double scale, uint32_t visible,
                   const Window& window);
// By what an answer's relative error is multiplied when the answer is merged with the window.
double ShareOfMerged(const QueryTruth& truth, std::span<const float> o, float lse);

// What an answer is worth: `attended` tokens of the rest, each once, and what they gave.
struct Quality {
  double recall_at_100 = 0;   // share of `best` that was attended; 1 if there is none
  double mass = 0;            // softmax mass over the rest that was attended
  double rel_l2 = 0;          // after the merge with the exact window
  double partial_rel_l2 = 0;  // before it
  // Tokens of the rest with at least kHeavyShare of all the softmax mass, the window's included,
  // and those of them that were not attended.
  uint32_t heavy = 0, heavy_missed = 0;
  double missed_share = 0;  // of all the softmax mass: the heaviest of `best` that was not attended
};
inline constexpr double kHeavyShare = 1.0 / 64;
Quality Judge(const QueryTruth& truth, std::span<const uint32_t> attended, std::span<const float> o,
              float lse);

// What the oracle is worth with its first `tokens` tokens, which is one of its points.
Quality OracleQuality(const QueryTruth& truth, uint32_t tokens);

// Tokens that top-k needs, chosen by exact scores, for an error (after the merge) of at most
// `error`; if none does so well, those of the least error.
uint32_t OracleTokens(const QueryTruth& truth, double error);

}  // namespace quarry::perf
