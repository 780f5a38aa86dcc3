// Heads for clustered indexes: keys with structure, values that go with them, in one or many runs.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_index/cluster_learn.h"
#include "cpu_index/cluster_search.h"
#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry::testing {

// Keys of a few strong directions around a mean, and values that go with them; `spread` is about
// the standard deviation of a query's scores.
class ClusterHead {
 public:
  static constexpr uint32_t kFirst = 300;  // token
  static constexpr uint32_t kSampled = 64, kAsked = 48;

  ClusterHead(uint32_t n, uint32_t d, float spread, DType type = DType::kBf16)
      : tokens(n), head_dim(d), dtype(type), random(static_cast<uint32_t>(SteadySeed()) + n) {
    const uint32_t strong = d / 4;
    directions = Normals(strong * d, 1 / std::sqrt(static_cast<float>(d)));
    to_value_ = Normals(strong * d, 0.3f);
    keys.resize(n * d * DTypeBytes(type));
    values.resize(keys.size());
    for (uint32_t t = 0; t < n; ++t) MakeToken(t, strong);
    scale = spread / 0.5f / std::sqrt(static_cast<float>(d));
    sampled = Normals(kSampled * d, scale);
    asked = Normals(kAsked * d, 1);
    for (float& x : asked) x = Bf16ToFloat(FloatToBf16(x));
  }
  ClusterHead(const ClusterHead&) = delete;

  TokenRange all() const { return {kFirst, kFirst + tokens}; }
  void SetKey(uint32_t t, std::span<const float> k) {
    for (uint32_t c = 0; c < head_dim; ++c) {
      StoreFromFloat(keys.data(), t * head_dim + c, dtype, k[c]);
    }
  }
  std::span<const float> Asked(uint32_t i) const {
    return std::span(asked).subspan(size_t{i} * head_dim, head_dim);
  }
  QueryBlock Queries(uint32_t first, uint32_t count) const {
    return {Asked(first).data(), DType::kBf16, count, head_dim, scale, {}};
  }

  uint32_t tokens, head_dim;
  DType dtype;
  float scale = 1;
  std::mt19937 random;
  std::vector<std::byte> keys, values;
  std::vector<float> directions;      // [][head_dim] that keys lie in, but for noise
  std::vector<float> sampled, asked;  // [queries][head_dim]; sampled ones are scaled

 private:
  std::vector<float> Normals(size_t n, float deviation) {
    std::vector<float> out(n);
    for (float& x : out) x = deviation * normal_(random);
    return out;
  }
  void MakeToken(uint32_t t, uint32_t strong) {
    const std::vector<float> at = Normals(strong, 1);
    for (uint32_t c = 0; c < head_dim; ++c) {
      float k = 0.5f + 0.1f * normal_(random), v = normal_(random) + 1.0f;
      for (uint32_t s = 0; s < strong; ++s) {
        k += at[s] * directions[s * head_dim + c];
        v += at[s] * to_value_[s * head_dim + c];
      }
      StoreFromFloat(keys.data(), t * head_dim + c, dtype, k);
      StoreFromFloat(values.data(), t * head_dim + c, dtype, v);
    }
  }

  std::normal_distribution<float> normal_;
  std::vector<float> to_value_;
};

// A head's tokens cut into runs, in segments of odd lengths, with their indexes.
class ClusterRuns {
 public:
  // ends: within the head, of each run.
  ClusterRuns(const ClusterHead& head, const std::vector<uint32_t>& ends) : head_(head) {
    uint32_t lo = 0;
    for (const uint32_t end : ends) {
      std::vector<KvSegment>& mine = segments_.emplace_back();
      for (; lo < end; lo = mine.back().tokens.hi - ClusterHead::kFirst) {
        const uint32_t hi = std::min(end, lo + 77);
        const size_t at = size_t{lo} * head.head_dim * DTypeBytes(head.dtype);
        mine.push_back({head.keys.data() + at, head.values.data() + at,
                        {ClusterHead::kFirst + lo, ClusterHead::kFirst + hi}});
      }
    }
    for (const auto& mine : segments_) views.push_back({mine, head.head_dim, head.dtype});
  }
  ClusterRuns(const ClusterRuns&) = delete;

  static std::vector<uint32_t> Even(const ClusterHead& head, uint32_t runs) {
    std::vector<uint32_t> ends;
    for (uint32_t r = 1; r <= runs; ++r) {
      ends.push_back(static_cast<uint32_t>(uint64_t{head.tokens} * r / runs));
    }
    return ends;
  }

  // From the first `from` runs; the others are built with their model. group: of the sampled queries.
  void Learn(std::span<const float> sampled, size_t from = ~size_t{0}, uint32_t group = 1) {
    from = std::min(from, views.size());
    auto learned = LearnClusters(std::span(views).first(from), sampled,
                                 {.group = group, .scan_if_faster = scan_if_faster});
    ASSERT_TRUE(learned.ok()) << learned.status();
    ASSERT_EQ(learned->indexes.size(), from);
    indexes = std::move(learned->indexes);
    model = learned->model;
    for (size_t r = from; r < views.size(); ++r) Add(r);
  }
  void Learn() { Learn(head_.sampled); }
  // Builds all with another model.
  void Rebuild(std::shared_ptr<const ClusterModel> with) {
    model = std::move(with);
    indexes.clear();
    for (size_t r = 0; r < views.size(); ++r) Add(r);
  }
  void OpenAll(bool open_all) {
    auto forced = std::make_shared<ClusterModel>(*model);
    forced->open_all = open_all;
    Rebuild(std::move(forced));
  }

  std::vector<KvView> views;
  std::vector<std::unique_ptr<ClusterIndex>> indexes;
  std::shared_ptr<const ClusterModel> model;
  bool scan_if_faster = false;  // as heads as small as these mostly are

 private:
  void Add(size_t r) {
    auto index = ClusterIndex::Build(views[r], model);
    ASSERT_TRUE(index.ok()) << index.status();
    indexes.push_back(*std::move(index));
  }

  const ClusterHead& head_;
  std::vector<std::vector<KvSegment>> segments_;
};

struct ClusterAnswer {
  std::vector<std::vector<float>> o;
  std::vector<float> lse;
  std::vector<double> predicted;
  std::vector<uint64_t> tokens;
  std::vector<uint32_t> refined;  // rising
  uint64_t bytes = 0;
};

namespace internal {

template <typename F>
ClusterAnswer Collect(const QueryBlock& queries, F&& attend) {
  std::vector<float> acc(size_t{queries.queries} * queries.head_dim);
  std::vector<Partial> partials(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * queries.head_dim, queries.head_dim);
  }
  ClusterAnswer answer;
  attend(std::span<Partial>(partials), &answer.refined);
  std::sort(answer.refined.begin(), answer.refined.end());
  for (const Partial& partial : partials) {
    answer.o.emplace_back(queries.head_dim);
    answer.lse.push_back(partial.Finish(answer.o.back()));
    answer.predicted.push_back(partial.RelativeError());
    answer.tokens.push_back(partial.tokens);
    answer.bytes += partial.bytes;
  }
  return answer;
}

}  // namespace internal

// ranges: of tokens, by query, over all runs.
inline ClusterAnswer Exactly(const ClusterRuns& runs, QueryBlock queries,
                             std::span<const TokenRange> ranges) {
  queries.ranges = ranges;
  return internal::Collect(queries, [&](std::span<Partial> partials, std::vector<uint32_t>*) {
    for (const KvView& view : runs.views) ExactScan().AttendAll(view, queries, partials);
  });
}

// parts: of each stage, run by as many threads.
inline ClusterAnswer Search(const ClusterRuns& runs, const QueryBlock& queries,
                            std::span<const TokenRange> ranges, const ClusterLimits& limits,
                            uint32_t parts = 1) {
  std::vector<ClusterRun> searched;
  for (size_t r = 0; r < runs.views.size(); ++r) {
    searched.push_back({runs.indexes[r].get(), &runs.views[r], ranges});
  }
  return internal::Collect(
      queries, [&](std::span<Partial> partials, std::vector<uint32_t>* refined) {
        if (parts == 1) return SearchClusters(searched, queries, limits, partials, refined);
        ClusterSearch search(searched, queries, limits, parts);
        EXPECT_LE(search.parts(), parts);
        EXPECT_GT(search.parts(), 1u);
        do {
          std::vector<std::jthread> threads;
          for (uint32_t p = 0; p < search.parts(); ++p) {
            threads.emplace_back([&, p] { search.RunPart(p); });
          }
        } while (search.Next());
        search.Finish(partials, refined);
      });
}

inline ClusterLimits Within(float tolerance) {
  ClusterLimits limits;
  limits.tolerance = tolerance;
  return limits;
}

inline double ErrorOf(const std::vector<float>& o, const std::vector<float>& exact) {
  double difference = 0, length = 0;
  for (size_t d = 0; d < o.size(); ++d) {
    difference += (double{o[d]} - exact[d]) * (double{o[d]} - exact[d]);
    length += double{exact[d]} * exact[d];
  }
  return std::sqrt(difference / length);
}

// Over the head's queries, `group` in a block.
struct ClusterErrors {
  std::vector<double> errors, predicted;
  uint64_t bytes = 0;
  double mean() const {
    double sum = 0;
    for (double x : errors) sum += x;
    return sum / static_cast<double>(errors.size());
  }
};
inline ClusterErrors ErrorsOf(const ClusterHead& head, const ClusterRuns& runs,
                              const ClusterLimits& limits, uint32_t group) {
  ClusterErrors out;
  const std::vector<TokenRange> ranges(group, head.all());
  for (uint32_t first = 0; first + group <= ClusterHead::kAsked; first += group) {
    const QueryBlock queries = head.Queries(first, group);
    const ClusterAnswer exact = Exactly(runs, queries, ranges);
    const ClusterAnswer found = Search(runs, queries, ranges, limits);
    for (uint32_t i = 0; i < group; ++i) out.errors.push_back(ErrorOf(found.o[i], exact.o[i]));
    out.predicted.insert(out.predicted.end(), found.predicted.begin(), found.predicted.end());
    out.bytes += found.bytes;
  }
  return out;
}

inline double Median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<ptrdiff_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

}  // namespace quarry::testing
