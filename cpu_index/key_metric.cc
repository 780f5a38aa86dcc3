#include "cpu_index/key_metric.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/query_basis.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = KeyMetric::kWidth;

// Keys that are no numbers are far from all others.
float Squared(float product, float a, float b) {
  const float d = a + b - 2 * product;
  return std::isfinite(d) ? std::max(0.0f, d) : std::numeric_limits<float>::max();
}

}  // namespace

absl::StatusOr<KeyMetric> KeyMetric::Fit(const KvView& run, std::span<const float> queries) {
  QUARRY_ASSIGN_OR_RETURN(const QueryBasis basis,
                          FitQueryBasis(run, queries, std::min(run.head_dim, kWidth)));
  const std::vector<float> rows = ProjectKeys(run, basis, kWidth);
  KeyMetric metric;
  metric.rows_.resize(rows.size());
  metric.square_.resize(rows.size() / kWidth);
  for (size_t i = 0; i < rows.size(); ++i) {
    metric.rows_[i] = FloatToBf16(rows[i]);
    const float x = Bf16ToFloat(metric.rows_[i]);
    metric.square_[i / kWidth] += x * x;
  }
  return metric;
}

std::vector<uint32_t> KeyMetric::Bisect() const {
  std::vector<float> rows(rows_.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = Bf16ToFloat(rows_[i]);
  return BisectRows(rows, kWidth);
}

void KeyDistances::Gather(std::span<const uint32_t> keys) {
  bf16_.resize(keys.size() * kWidth);
  for (size_t i = 0; i < keys.size(); ++i) {
    std::memcpy(bf16_.data() + i * kWidth, metric_.rows_.data() + size_t{keys[i]} * kWidth,
                kWidth * sizeof(uint16_t));
  }
}

// distance_ [queries][keys] = the products of queries with the gathered rows.
void KeyDistances::Products(const float* q, const uint16_t* q_bf16, uint32_t queries,
                            uint32_t keys) {
  distance_.resize(size_t{queries} * keys);
  kernels::ScoreTile tile{};
  tile.q = q;
  tile.q_bf16 = q_bf16;
  tile.queries = queries;
  tile.head_dim = kWidth;
  tile.k = bf16_.data();
  tile.tokens = keys;
  tile.dtype = kernels::kBf16;
  tile.scale = 1;
  tile.out = distance_.data();
  tile.ld_out = keys;
  if (queries > 0 && keys > 0) Kernels().score(tile);
}

std::span<const float> KeyDistances::From(uint32_t key, std::span<const uint32_t> others) {
  Gather(others);
  const uint16_t* const row = metric_.rows_.data() + size_t{key} * kWidth;
  own_.resize(kWidth);
  for (uint32_t c = 0; c < kWidth; ++c) own_[c] = Bf16ToFloat(row[c]);
  Products(own_.data(), row, 1, static_cast<uint32_t>(others.size()));
  for (size_t i = 0; i < others.size(); ++i) {
    distance_[i] = Squared(distance_[i], metric_.square_[key], metric_.square_[others[i]]);
  }
  return distance_;
}

std::span<const float> KeyDistances::Among(std::span<const uint32_t> keys) {
  Gather(keys);
  fp32_.resize(bf16_.size());
  for (size_t i = 0; i < fp32_.size(); ++i) fp32_[i] = Bf16ToFloat(bf16_[i]);
  const auto n = static_cast<uint32_t>(keys.size());
  Products(fp32_.data(), bf16_.data(), n, n);
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < n; ++j) {
      float& d = distance_[size_t{i} * n + j];
      d = Squared(d, metric_.square_[keys[i]], metric_.square_[keys[j]]);
    }
  }
  return distance_;
}

void KeyDistances::Choose(uint32_t key, uint32_t most, std::vector<uint32_t>* candidates) {
  std::sort(candidates->begin(), candidates->end());
  candidates->erase(std::unique(candidates->begin(), candidates->end()), candidates->end());
  std::erase(*candidates, key);
  const std::span<const float> from = From(key, *candidates);
  std::vector<std::pair<float, uint32_t>> near(candidates->size());
  for (size_t i = 0; i < near.size(); ++i) near[i] = {from[i], (*candidates)[i]};
  const size_t compared = std::min<size_t>(near.size(), std::max(most, kCompared));
  std::partial_sort(near.begin(), near.begin() + static_cast<ptrdiff_t>(compared), near.end());
  candidates->clear();
  for (size_t i = 0; i < compared; ++i) candidates->push_back(near[i].second);
  if (compared <= most) return;
  const std::span<const float> among = Among(*candidates);
  std::vector<uint32_t> kept, left;
  for (uint32_t i = 0; i < compared && kept.size() < most; ++i) {
    const bool hidden = std::any_of(kept.begin(), kept.end(), [&](uint32_t r) {
      return among[i * compared + r] < near[i].first;
    });
    (hidden ? left : kept).push_back(i);
  }
  for (size_t i = 0; i < left.size() && kept.size() < most; ++i) kept.push_back(left[i]);
  std::sort(kept.begin(), kept.end());
  candidates->clear();
  for (uint32_t i : kept) candidates->push_back(near[i].second);
}

}  // namespace quarry
