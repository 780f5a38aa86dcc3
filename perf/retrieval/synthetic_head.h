// One KV head whose keys, values and queries have the structure that makes real heads hard.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "perf/retrieval/random_trace.h"

namespace quarry::perf {

// Every token has a latent vector, in part its own and in part its topic's, which changes slowly.
// Keys are a linear image of it, values weakly another; queries look for the latent of a token
// through a third that weighs directions otherwise, so they are out of the keys' distribution.
struct HeadRecipe {
  float key_mean = 1.0f;      // length of the keys' mean, where their spread has length 1
  float query_offset = 1.5f;  // of the queries' own mean, where what they seek has length 1
  uint32_t rank = 32;         // of the latent vectors
  float noise = 0.4f;         // length of the keys' spread outside the latent's image
  bool rope = true;           // positions rotate keys and queries; content lies mostly where
                              // frequencies are low
  bool still_mean = false;    // the mean lies only where positions hardly turn it
  bool drift = false;         // see SyntheticHead::Query
  uint32_t needles = 0;       // tokens of each of 16 sets that share a mark; 0: no sets
};

// Not thread-safe. The same seed gives the same numbers.
class SyntheticHead {
 public:
  SyntheticHead(const HeadRecipe& recipe, const RandomTraceOptions& shape,
                std::span<const uint32_t> seed);

  // Keys after RoPE and values, [tokens][head_dim] of the shape's dtype each. Once, before the
  // queries.
  void WriteTokens(std::byte* k, std::byte* v);

  enum class Purpose {
    kTraining,  // of the sets of needles every second one is never sought
    kTest,
  };
  // The group's queries at a position, after RoPE, into [group][head_dim]: what one token before
  // it has, or what a set of needles has, each query head in its own way. With drift, training
  // queries seek only half of the latent directions; `progress` (0 to 1) turns what is sought to
  // the other half, and the queries' mean to another.
  void Query(uint32_t position, Purpose purpose, float progress, float* out);

 private:
  using Vector = std::vector<float>;

  Vector Normals(size_t n);
  Vector Direction(float length);  // random, of that root mean square, weighed as content is
  void MakeLatents();
  void PlaceNeedles();
  Vector Sought(uint32_t position, float progress);
  void Rotate(uint32_t position, float* x) const;

  const HeadRecipe recipe_;
  const RandomTraceOptions shape_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  Vector inv_freq_;                         // [head_dim / 2]; empty: no rotation
  Vector weight_;                           // [head_dim] of content
  Vector latent_;                           // [tokens][rank]
  Vector key_map_, query_map_, value_map_;  // [rank][head_dim]
  Vector key_mean_, value_mean_;            // [head_dim]
  Vector query_mean_, later_query_mean_;
  Vector marks_, mark_values_;  // [sets][head_dim]
  std::vector<int> set_;        // [tokens] of needles that a token belongs to, or -1
};

}  // namespace quarry::perf
