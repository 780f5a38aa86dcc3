// Partial attention over a set of tokens, and its exact merge.
#pragma once

#include <cstdint>
#include <span>

namespace quarry {

// Unnormalised running state of softmax attention for one query over a set of tokens.
// o = acc / sum, lse = max + log(sum). Empty: max = -infinity, sum = 0, acc = 0.
// Disjoint sets merge in any order (STYLE: every part that answers a query returns this).
struct Partial {
  float max = -__builtin_inff();
  float sum = 0;
  uint64_t tokens = 0;         // attended
  uint64_t bytes = 0;          // of K, V and index data read, shared reads counted once
  std::span<float> acc;        // [head_dim], owned by the caller, zero at the start
  // Expected square of the length of acc's error, where parts of it are estimated: those of
  // disjoint sets are taken as independent.
  float doubt = 0;

  void Merge(const Partial& other);
  // Writes o [head_dim] and returns lse. An empty set gives o = 0 and -infinity.
  float Finish(std::span<float> o) const;
  // Log of the length of the sum of e^score * value; -infinity for an empty set.
  float LogLength() const;
  // The expected length of o's error by that of o; 0 for an empty set.
  float RelativeError() const;
};

// Actual by predicted relative error of an answer; errors below 1e-3 count as that, for exact
// answers of bf16 rows differ by so much between two orders of their tokens.
double ErrorRatio(double actual, double predicted);

// Merges two finished partials (o, lse) of disjoint sets: o_a, lse_a become the merge. Either may
// be empty (lse = -infinity); two empty sets stay empty. Never NaN for finite inputs.
void MergeFinished(std::span<float> o_a, float* lse_a, std::span<const float> o_b, float lse_b);

}  // namespace quarry
