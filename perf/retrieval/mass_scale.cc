#include "perf/retrieval/mass_scale.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "perf/statistics.h"
#include "proto/check.h"

namespace quarry::perf {
namespace {

constexpr uint32_t kQueriesAtOnce = 8;  // bounds the memory of the scores
constexpr int kBisections = 16;         // to a quarter of a thousandth of the factor
constexpr float kLowest = 1e-3f, kHighest = 1e4f;

// How many of the falling scores, times `factor`, hold the share of the mass.
double TokensWithShare(std::span<const float> falling, float factor, double share) {
  const auto weight = [&](float z) { return std::exp(factor * (z - falling.front())); };
  double total = 0, taken = 0;
  for (float z : falling) total += weight(z);
  size_t i = 0;
  while (i < falling.size() && taken < share * total) taken += weight(falling[i++]);
  return static_cast<double>(i);
}

// Of each query over its range, falling.
std::vector<std::vector<float>> SortedScores(const KvView& head, const QueryBlock& queries) {
  std::vector<std::vector<float>> out;
  CoarseScores scores;
  for (uint32_t lo = 0; lo < queries.queries; lo += kQueriesAtOnce) {
    QueryBlock part = queries;
    part.q += size_t{lo} * queries.head_dim;
    part.queries = std::min(kQueriesAtOnce, queries.queries - lo);
    part.ranges = queries.ranges.subspan(lo, part.queries);
    ExactScan().Score(head, part, &scores);
    for (uint32_t i = 0; i < part.queries; ++i) {
      const TokenRange range = part.ranges[i];
      const float* const at =
          scores.score.data() + size_t{i} * scores.nodes + (range.lo - scores.tokens.lo);
      std::vector<float>& row = out.emplace_back(at, at + range.size());
      std::sort(row.begin(), row.end(), std::greater<float>());
    }
  }
  return out;
}

}  // namespace

float ScaleForMass(const KvView& head, const QueryBlock& queries, const MassTarget& target) {
  QUARRY_CHECK(queries.queries > 0 && !queries.ranges.front().empty());
  const std::vector<std::vector<float>> scores = SortedScores(head, queries);
  const auto median = [&](float factor) {
    std::vector<double> tokens;
    for (const std::vector<float>& row : scores) {
      tokens.push_back(TokensWithShare(row, factor, target.share));
    }
    return Median(std::move(tokens));
  };
  // A larger factor never takes more tokens.
  double low = std::log(kLowest), high = std::log(kHighest);
  for (int i = 0; i < kBisections; ++i) {
    const double middle = (low + high) / 2;
    (median(static_cast<float>(std::exp(middle))) > target.tokens ? low : high) = middle;
  }
  return static_cast<float>(std::exp(high));
}

}  // namespace quarry::perf
