// Keys with structure, and queries of another distribution than theirs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cpu_index/key_index.h"
#include "proto/half.h"

namespace quarry::testing {

// A run in segments of 256 tokens. Keys are a linear image of what tokens are about, around a
// strong mean; queries look for what a token is about through an image that weighs directions
// otherwise, and have a mean of their own.
class GraphCase {
 public:
  static constexpr uint32_t kHeadDim = 64, kRank = 16, kGroup = 4, kFirst = 384;
  static constexpr float kScale = 0.125f;

  GraphCase(uint32_t tokens, uint32_t seed, DType dtype = DType::kBf16)
      : tokens_(tokens), dtype_(dtype), random_(seed) {
    image_ = Normals(kRank * kHeadDim, 1 / std::sqrt(static_cast<float>(kHeadDim)));
    weight_ = Normals(kRank, 1);
    for (float& w : weight_) w = std::exp(w);
    key_mean_ = Normals(kHeadDim, 0.5f);
    query_mean_ = Normals(kHeadDim, 1.0f);
    topic_ = Normals(kRank, 1);
    k_.resize(size_t{tokens} * kHeadDim * DTypeBytes(dtype));
    v_.resize(k_.size());
    for (uint32_t t = 0; t < tokens; ++t) MakeToken(t);
    for (uint32_t lo = 0; lo < tokens; lo += 256) {
      const size_t at = size_t{lo} * kHeadDim * DTypeBytes(dtype);
      segments_.push_back({k_.data() + at, v_.data() + at,
                           {kFirst + lo, kFirst + std::min(tokens, lo + 256)}});
    }
    view = {segments_, kHeadDim, dtype};
    MakeQueries(1, &q_);
    ranges.assign(kGroup, view.tokens());
    queries = {q_.data(), DType::kBf16, kGroup, kHeadDim, kScale, ranges};
  }
  GraphCase(const GraphCase&) = delete;

  // A group's queries for each of `positions` tokens.
  void MakeQueries(uint32_t positions, std::vector<float>* out) {
    out->clear();
    for (uint32_t p = 0; p < positions; ++p) {
      const float* const latent = latent_.data() + random_() % tokens_ * kRank;
      for (uint32_t head = 0; head < kGroup; ++head) {
        const std::vector<float> noise = Normals(kHeadDim, 0.3f);
        for (uint32_t d = 0; d < kHeadDim; ++d) {
          float x = query_mean_[d] + noise[d];
          for (uint32_t r = 0; r < kRank; ++r) {
            x += 3 * weight_[r] * latent[r] * image_[r * kHeadDim + d];
          }
          out->push_back(Bf16ToFloat(FloatToBf16(x)));
        }
      }
    }
  }
  // Other queries of the case.
  void SetQueries() {
    MakeQueries(1, &q_);
    queries.q = q_.data();
  }

  double Score(uint32_t query, uint32_t token) const {
    double dot = 0;
    for (uint32_t d = 0; d < kHeadDim; ++d) {
      dot += double{q_[query * kHeadDim + d]} *
             LoadAsFloat(k_.data(), size_t{token - kFirst} * kHeadDim + d, dtype_);
    }
    return dot * kScale;
  }
  // The k best tokens of the query's range.
  std::set<uint32_t> Best(uint32_t query, size_t k) const {
    std::vector<std::pair<double, uint32_t>> all;
    for (uint32_t t = std::max(kFirst, ranges[query].lo);
         t < std::min(kFirst + tokens_, ranges[query].hi); ++t) {
      all.push_back({-Score(query, t), t});
    }
    std::sort(all.begin(), all.end());
    std::set<uint32_t> out;
    for (size_t i = 0; i < std::min(k, all.size()); ++i) out.insert(all[i].second);
    return out;
  }
  // The share of each query's k best tokens that the lists hold.
  double Recall(const CoarseScores& lists, size_t k) const {
    double hits = 0, all = 0;
    for (uint32_t i = 0; i < queries.queries; ++i) {
      std::set<uint32_t> found;
      for (size_t j = 0; j < lists.Row(i).size(); ++j) {
        found.insert(lists.tokens.lo + lists.NodeOf(i, j));
      }
      for (uint32_t token : Best(i, k)) hits += found.contains(token) ? 1 : 0;
      all += static_cast<double>(std::min<size_t>(k, Best(i, k).size()));
    }
    return hits / all;
  }

  KvView view;
  std::vector<TokenRange> ranges;
  QueryBlock queries;

 private:
  std::vector<float> Normals(size_t n, float deviation) {
    std::vector<float> out(n);
    for (float& x : out) x = deviation * normal_(random_);
    return out;
  }
  // What tokens are about changes slowly; a part of it is a token's own.
  void MakeToken(uint32_t token) {
    if (token % 64 == 0) topic_ = Normals(kRank, 1);
    const std::vector<float> own = Normals(kRank, 0.6f), noise = Normals(kHeadDim, 0.1f);
    for (uint32_t r = 0; r < kRank; ++r) latent_.push_back(topic_[r] + own[r]);
    const float* const latent = latent_.data() + size_t{token} * kRank;
    const std::vector<float> value = Normals(kHeadDim, 1);
    for (uint32_t d = 0; d < kHeadDim; ++d) {
      float x = key_mean_[d] + noise[d];
      for (uint32_t r = 0; r < kRank; ++r) x += latent[r] * image_[r * kHeadDim + d];
      StoreFromFloat(k_.data(), size_t{token} * kHeadDim + d, dtype_, x);
      StoreFromFloat(v_.data(), size_t{token} * kHeadDim + d, dtype_, value[d]);
    }
  }

  const uint32_t tokens_;
  const DType dtype_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<float> image_, weight_, key_mean_, query_mean_, topic_, latent_, q_;
  std::vector<char> k_, v_;
  std::vector<KvSegment> segments_;
};

}  // namespace quarry::testing
