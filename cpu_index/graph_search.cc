#include "cpu_index/graph_search.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "cpu_index/token_set.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr size_t kLineBytes = 64;
// Keys scored in one call: 64 KiB of 256 bytes each, a part of the L2 cache.
constexpr size_t kBatchKeys = 256;

// The best keys that one query has met, best first.
class Queue {
 public:
  explicit Queue(uint32_t room) : room_(room) { best_.reserve(size_t{room} + 1); }

  void Add(float score, uint32_t key) {
    if (!(score > least_)) return;
    const auto at = std::upper_bound(best_.begin(), best_.end(), score,
                                     [](float s, const Entry& e) { return s > e.score; });
    next_ = std::min(next_, static_cast<size_t>(at - best_.begin()));
    best_.insert(at, {score, key});
    if (best_.size() > room_) best_.pop_back();
    if (best_.size() == room_) least_ = best_.back().score;
  }

  // The best key that is not in `followed`; false if there is none.
  bool Next(const TokenSet& followed, uint32_t* key) {
    while (next_ < best_.size() && followed.Contains(best_[next_].key)) ++next_;
    if (next_ == best_.size()) return false;
    *key = best_[next_].key;
    return true;
  }
  bool closed() const { return room_ == 0; }

 private:
  struct Entry {
    float score;
    uint32_t key;
  };
  const size_t room_;
  float least_ = -std::numeric_limits<float>::infinity();
  size_t next_ = 0;  // everything before it has been followed
  std::vector<Entry> best_;
};

class Search {
 public:
  Search(const GraphLinks& graph, const KvView& run, const QueryBlock& queries)
      : graph_(graph),
        queries_(queries),
        tokens_(run.tokens()),
        dtype_(run.dtype),
        rows_(run, KvPart::kKey),
        met_(graph.keys()),
        followed_(graph.keys()),
        gathered_(kBatchKeys * rows_.row_bytes()),
        batch_(queries.queries * kBatchKeys) {
    if (queries.q_dtype == DType::kBf16) {
      bf16_.resize(size_t{queries.queries} * queries.head_dim);
      for (size_t i = 0; i < bf16_.size(); ++i) bf16_[i] = FloatToBf16(queries.q[i]);
    }
    scores_.resize(queries.queries);
  }

  void Run(uint32_t queue);
  void Report(CoarseScores* out) const;

 private:
  void OpenQueues(uint32_t queue);
  bool ChooseKeys();
  void Meet(uint32_t key);
  void ScoreBatch();

  const GraphLinks& graph_;
  const QueryBlock& queries_;
  const TokenRange tokens_;
  const DType dtype_;
  const RunRows rows_;
  std::vector<uint16_t> bf16_;  // the queries, if they are exactly that
  TokenSet met_, followed_;
  std::vector<Queue> queues_;                // [queries]
  std::vector<uint32_t> chosen_;             // whose links are followed next
  std::vector<uint32_t> order_;              // keys as they were met
  size_t scored_ = 0;                        // of them
  std::vector<std::vector<float>> scores_;   // [queries][scored]
  std::vector<std::byte> gathered_;          // keys of one batch
  std::vector<float> batch_;                 // [queries][kBatchKeys] their scores
  uint64_t link_bytes_ = 0;
};

// The part of a run that a query asks for, if not all of it, is read if that is no more than
// finding as many keys in it as a queue has would take, at about four keys read for each.
void Search::OpenQueues(uint32_t queue) {
  for (uint32_t i = 0; i < queries_.queries; ++i) {
    const TokenRange range = Intersect(queries_.ranges[i], tokens_);
    const uint64_t part = range.size(), wanted = uint64_t{queue} * tokens_.size();
    if (part * part <= 4 * wanted) {
      queues_.emplace_back(0);
      for (uint32_t t = range.lo; t < range.hi; ++t) Meet(t - tokens_.lo);
    } else {
      queues_.emplace_back(static_cast<uint32_t>((wanted + part - 1) / part));
    }
  }
}

void Search::Meet(uint32_t key) {
  if (!met_.Add(key)) return;
  order_.push_back(key);
  const std::byte* const row = rows_.At(key);
  for (size_t at = 0; at < rows_.row_bytes(); at += kLineBytes) __builtin_prefetch(row + at);
}

// Scores what was met since the last time for all queries, and offers it to their queues.
void Search::ScoreBatch() {
  const uint32_t n = queries_.queries;
  kernels::ScoreTile tile{};
  tile.q = queries_.q;
  tile.q_bf16 = bf16_.empty() ? nullptr : bf16_.data();
  tile.queries = n;
  tile.head_dim = queries_.head_dim;
  tile.k = gathered_.data();
  tile.dtype = static_cast<uint8_t>(dtype_);
  tile.scale = queries_.scale;
  tile.out = batch_.data();
  tile.ld_out = kBatchKeys;
  while (scored_ < order_.size()) {
    tile.tokens = static_cast<uint32_t>(std::min(kBatchKeys, order_.size() - scored_));
    const uint32_t* const keys = order_.data() + scored_;
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      std::memcpy(gathered_.data() + t * rows_.row_bytes(), rows_.At(keys[t]), rows_.row_bytes());
    }
    Kernels().score(tile);
    for (uint32_t i = 0; i < n; ++i) {
      const float* const row = batch_.data() + size_t{i} * kBatchKeys;
      scores_[i].insert(scores_[i].end(), row, row + tile.tokens);
      if (queues_[i].closed()) continue;
      for (uint32_t t = 0; t < tile.tokens; ++t) queues_[i].Add(row[t], keys[t]);
    }
    scored_ += tile.tokens;
  }
}

// One key of each queue; false if there is none left.
bool Search::ChooseKeys() {
  chosen_.clear();
  for (Queue& queue : queues_) {
    uint32_t key = 0;
    if (!queue.Next(followed_, &key)) continue;
    followed_.Add(key);
    chosen_.push_back(key);
    const auto* const row = reinterpret_cast<const char*>(graph_.Row(key));
    __builtin_prefetch(row);
    __builtin_prefetch(row + kLineBytes);
  }
  return !chosen_.empty();
}

void Search::Run(uint32_t queue) {
  OpenQueues(queue);
  const bool searches = std::any_of(queues_.begin(), queues_.end(),
                                    [](const Queue& q) { return !q.closed(); });
  if (searches) {
    for (uint32_t entry : graph_.entries) Meet(entry);
  }
  ScoreBatch();
  while (ChooseKeys()) {
    for (uint32_t key : chosen_) {
      const std::span<const uint32_t> links = graph_.Of(key);
      link_bytes_ += ((1 + links.size()) * sizeof(uint32_t) + kLineBytes - 1) / kLineBytes *
                     kLineBytes;
      for (uint32_t other : links) Meet(other);
    }
    ScoreBatch();
  }
}

// Lists of rising tokens: where each key that was met comes follows from the set of them.
void Search::Report(CoarseScores* out) const {
  out->Clear();
  out->tokens = tokens_;
  out->nodes = tokens_.size();
  out->bytes = order_.size() * rows_.row_bytes() + link_bytes_;
  std::vector<uint32_t> before;  // keys met in earlier words
  uint32_t sum = 0;
  for (uint64_t word : met_.words()) {
    before.push_back(sum);
    sum += static_cast<uint32_t>(std::popcount(word));
  }
  std::vector<uint32_t> rising(order_.size()), place(order_.size());
  for (size_t i = 0; i < order_.size(); ++i) {
    const uint32_t key = order_[i];
    const uint64_t lower = met_.words()[key / 64] & ((uint64_t{1} << key % 64) - 1);
    place[i] = before[key / 64] + static_cast<uint32_t>(std::popcount(lower));
    rising[place[i]] = key;
  }
  out->first.push_back(0);
  std::vector<float> row(order_.size());
  for (uint32_t i = 0; i < queries_.queries; ++i) {
    for (size_t j = 0; j < row.size(); ++j) row[place[j]] = scores_[i][j];
    const TokenRange range = Intersect(queries_.ranges[i], tokens_);
    const auto lo = std::lower_bound(rising.begin(), rising.end(), range.lo - tokens_.lo);
    const auto hi = std::lower_bound(lo, rising.end(), range.hi - tokens_.lo);
    out->node.insert(out->node.end(), lo, hi);
    out->score.insert(out->score.end(), row.begin() + (lo - rising.begin()),
                      row.begin() + (hi - rising.begin()));
    out->first.push_back(static_cast<uint32_t>(out->node.size()));
  }
}

}  // namespace

void SearchGraph(const GraphLinks& graph, const KvView& run, const QueryBlock& queries,
                 uint32_t queue, CoarseScores* out) {
  Search search(graph, run, queries);
  search.Run(queue);
  search.Report(out);
}

}  // namespace quarry
