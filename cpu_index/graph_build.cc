#include "cpu_index/graph_build.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/graph_reach.h"
#include "cpu_index/key_metric.h"
#include "cpu_index/parallel_for.h"
#include "cpu_index/top_keys.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Queries whose nearest key is the same share its links; some keys are nearest to most queries,
// and their links cannot serve all of those. So the next query takes its second nearest.
constexpr uint32_t kQueriesPerPivot = 16;
// Keys compared with each other for near ones, and how many near ones each takes. Recall@100 of
// 32768 keys of 64 dimensions and 1024 sampled positions, queue 256: groups of 256, 0.93; of 1024,
// 0.96; of 4096, 0.97, but twice the time. 16 near keys: no more recall, a quarter more bytes.
constexpr uint32_t kGroupKeys = 1024;
constexpr uint32_t kNearKeys = 8;
// Of the keys that a query found, so many near ones become neighbours of each: 0.93-0.96 becomes
// 0.98-0.99, for they are near in what queries look at, wherever the bisection cut. With 6, the
// same.
constexpr uint32_t kJoinedKeys = 3;
constexpr size_t kGrain = 256;  // keys that a thread takes at once

// Lists of keys, one per key, as one array.
struct Lists {
  std::vector<uint64_t> first;  // [keys + 1]
  std::vector<uint32_t> item;
  std::span<const uint32_t> Of(uint32_t key) const {
    return std::span(item).subspan(first[key], first[key + 1] - first[key]);
  }
};

// Sorts (key, item) pairs by key, in the order in which `each` gives them, which it does twice.
template <typename Each>
Lists Collect(uint32_t keys, Each&& each) {
  Lists out;
  out.first.assign(size_t{keys} + 1, 0);
  each([&](uint32_t key, uint32_t) { ++out.first[key + 1]; });
  std::partial_sum(out.first.begin(), out.first.end(), out.first.begin());
  out.item.resize(out.first.back());
  std::vector<uint64_t> at(out.first.begin(), out.first.end() - 1);
  each([&](uint32_t key, uint32_t item) { out.item[at[key]++] = item; });
  return out;
}

// What the training queries found: [queries][width] keys, nearest first.
struct QueryKeys {
  std::vector<uint32_t> key;
  uint32_t width = 0;
  size_t queries() const { return width == 0 ? 0 : key.size() / width; }
  std::span<const uint32_t> Of(size_t query) const {
    return std::span(key).subspan(query * width, width);
  }
};

// The pivot of each query: its nearest key that has room, or its nearest.
std::vector<uint32_t> ChoosePivots(const QueryKeys& found, uint32_t keys) {
  std::vector<uint32_t> load(keys), pivot;
  for (size_t i = 0; i < found.queries(); ++i) {
    const std::span<const uint32_t> list = found.Of(i);
    const auto free = std::find_if(list.begin(), list.end(),
                                   [&](uint32_t key) { return load[key] < kQueriesPerPivot; });
    pivot.push_back(free == list.end() ? list.front() : *free);
    ++load[pivot.back()];
  }
  return pivot;
}

// Makes the links of one build, step by step.
class Builder {
 public:
  Builder(const KeyMetric& metric, const GraphOptions& options)
      : metric_(metric),
        options_(options),
        own_(options.links - 1),
        out_(metric.keys(), options.links) {
    near_.resize(size_t{metric.keys()} * kNearKeys, kNone);
  }

  void FindNear();
  void Join(const QueryKeys& found);
  void Project(const QueryKeys& found, std::span<const uint32_t> pivots);
  void AddReverse();
  void ChooseEntries(std::span<const uint32_t> pivots);
  GraphLinks Finish() {
    ReachAll(&out_);
    return std::move(out_);
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};

  void SetLinks(uint32_t key, std::span<const uint32_t> links) {
    uint32_t* const row = out_.Row(key);
    row[0] = static_cast<uint32_t>(links.size());
    std::copy(links.begin(), links.end(), row + 1);
  }

  const KeyMetric& metric_;
  const GraphOptions options_;
  const uint32_t own_;           // links that a key chooses; one is left for ReachAll
  std::vector<uint32_t> near_;    // [keys][kNearKeys], or kNone
  std::vector<uint32_t> joined_;  // [queries][width][kJoinedKeys], or kNone
  GraphLinks out_;
};

// Gives each of `keys` the `most` nearest of the others: near(i, j, key).
template <typename Near>
void NearestAmong(std::span<const uint32_t> keys, uint32_t most, KeyDistances* distances,
                  Near&& near) {
  const std::span<const float> among = distances->Among(keys);
  const size_t taken = std::min<size_t>(most, keys.size() - 1);
  std::vector<std::pair<float, uint32_t>> best;
  for (size_t i = 0; i < keys.size(); ++i) {
    best.clear();
    const float* const row = among.data() + i * keys.size();
    float bound = std::numeric_limits<float>::infinity();
    for (size_t j = 0; j < keys.size(); ++j) {
      if (row[j] > bound || j == i) continue;
      const std::pair<float, uint32_t> other(row[j], keys[j]);
      best.insert(std::upper_bound(best.begin(), best.end(), other), other);
      if (best.size() > taken) best.pop_back();
      if (best.size() == taken) bound = best.back().first;
    }
    for (size_t j = 0; j < best.size(); ++j) near(i, j, best[j].second);
  }
}

// The nearest keys of each among those of its group of the bisection.
void Builder::FindNear() {
  const std::vector<uint32_t> order = metric_.Bisect();
  ParallelFor(options_.threads, order.size(), kGroupKeys, [&](size_t lo, size_t hi) {
    KeyDistances distances(metric_);
    const std::span<const uint32_t> group = std::span(order).subspan(lo, hi - lo);
    NearestAmong(group, kNearKeys, &distances, [&](size_t i, size_t j, uint32_t other) {
      near_[size_t{group[i]} * kNearKeys + j] = other;
    });
  });
}

// The nearest keys of each among those that a query found with it.
void Builder::Join(const QueryKeys& found) {
  joined_.assign(found.key.size() * kJoinedKeys, kNone);
  ParallelFor(options_.threads, found.queries(), 16, [&](size_t lo, size_t hi) {
    KeyDistances distances(metric_);
    for (size_t query = lo; query < hi; ++query) {
      NearestAmong(found.Of(query), kJoinedKeys, &distances,
                   [&](size_t i, size_t j, uint32_t other) {
                     joined_[(query * found.width + i) * kJoinedKeys + j] = other;
                   });
    }
  });
}

// Pivots take the keys of all their queries, every key its near ones.
void Builder::Project(const QueryKeys& found, std::span<const uint32_t> pivots) {
  const Lists queries = Collect(out_.keys(), [&](auto&& add) {
    for (uint32_t i = 0; i < pivots.size(); ++i) add(pivots[i], i);
  });
  const Lists places = Collect(out_.keys(), [&](auto&& add) {
    for (uint32_t i = 0; i < found.key.size(); ++i) add(found.key[i], i);
  });
  ParallelFor(options_.threads, out_.keys(), kGrain, [&](size_t lo, size_t hi) {
    KeyDistances distances(metric_);
    std::vector<uint32_t> candidates;
    for (auto key = static_cast<uint32_t>(lo); key < hi; ++key) {
      candidates.clear();
      for (uint32_t place : places.Of(key)) {
        for (uint32_t j = 0; j < kJoinedKeys; ++j) {
          const uint32_t other = joined_[size_t{place} * kJoinedKeys + j];
          if (other != kNone) candidates.push_back(other);
        }
      }
      for (uint32_t query : queries.Of(key)) {
        const std::span<const uint32_t> list = found.Of(query);
        candidates.insert(candidates.end(), list.begin(), list.end());
      }
      for (uint32_t j = 0; j < kNearKeys; ++j) {
        const uint32_t other = near_[size_t{key} * kNearKeys + j];
        if (other != kNone) candidates.push_back(other);
      }
      distances.Choose(key, own_, &candidates);
      SetLinks(key, candidates);
    }
  });
}

void Builder::AddReverse() {
  const GraphLinks forward = out_;
  const Lists reverse = Collect(out_.keys(), [&](auto&& add) {
    for (uint32_t key = 0; key < forward.keys(); ++key) {
      for (uint32_t other : forward.Of(key)) add(other, key);
    }
  });
  ParallelFor(options_.threads, out_.keys(), kGrain, [&](size_t lo, size_t hi) {
    KeyDistances distances(metric_);
    std::vector<uint32_t> candidates;
    for (auto key = static_cast<uint32_t>(lo); key < hi; ++key) {
      const std::span<const uint32_t> to = forward.Of(key), from = reverse.Of(key);
      candidates.assign(to.begin(), to.end());
      candidates.insert(candidates.end(), from.begin(), from.end());
      distances.Choose(key, own_, &candidates);
      SetLinks(key, candidates);
    }
  });
}

// Half of them pivots of queries at even steps of all. The others one by one, each the key farthest
// from all before it: keys that lie apart, which perhaps no sampled query sought, and to which few
// links lead.
void Builder::ChooseEntries(std::span<const uint32_t> pivots) {
  const size_t n = std::min<size_t>(options_.entries, out_.keys());
  std::vector<uint32_t> order(out_.keys());
  std::iota(order.begin(), order.end(), 0);
  std::vector<float> nearest(out_.keys(), std::numeric_limits<float>::max());
  const auto add = [&](uint32_t entry) {
    out_.entries.push_back(entry);
    ParallelFor(options_.threads, order.size(), 8192, [&](size_t lo, size_t hi) {
      KeyDistances distances(metric_);
      const std::span<const float> from =
          distances.From(entry, std::span(order).subspan(lo, hi - lo));
      for (size_t i = lo; i < hi; ++i) nearest[i] = std::min(nearest[i], from[i - lo]);
    });
  };
  const size_t sought = std::min((n + 1) / 2, pivots.size());
  for (size_t i = 0; i < sought; ++i) add(pivots[(2 * i + 1) * pivots.size() / (2 * sought)]);
  for (size_t i = sought; i < n; ++i) {
    add(static_cast<uint32_t>(std::max_element(nearest.begin(), nearest.end()) - nearest.begin()));
  }
  std::sort(out_.entries.begin(), out_.entries.end());
  out_.entries.erase(std::unique(out_.entries.begin(), out_.entries.end()), out_.entries.end());
}

}  // namespace

absl::StatusOr<GraphLinks> BuildGraph(const KvView& run, std::span<const float> queries,
                                      const GraphOptions& options) {
  if (options.query_keys == 0 || options.entries == 0 || options.links < 4 ||
      options.links > 255) {
    return absl::InvalidArgumentError(
        absl::StrCat("graph: query_keys ", options.query_keys, ", links ", options.links,
                     " and entries ", options.entries,
                     " must be at least 1, 4 to 255, and at least 1"));
  }
  QUARRY_ASSIGN_OR_RETURN(const KeyMetric metric, KeyMetric::Fit(run, queries));
  QueryKeys found;
  found.width = std::min(options.query_keys, metric.keys());
  found.key = TopKeys(run, queries, found.width, options.threads);
  const std::vector<uint32_t> pivots = ChoosePivots(found, metric.keys());
  Builder builder(metric, options);
  builder.FindNear();
  builder.Join(found);
  builder.Project(found, pivots);
  builder.AddReverse();
  builder.ChooseEntries(pivots);
  return builder.Finish();
}

}  // namespace quarry
