// KeyIndex: what finds, for query vectors, the tokens of one run that carry their attention.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/partial.h"
#include "cpu_index/sample_lift.h"
#include "proto/types.h"

namespace quarry {

// Contiguous K and V of one (layer, kv_head): [tokens][head_dim] each, of the view's dtype.
// 64-byte aligned in the arena; kernels accept any alignment.
struct KvSegment {
  const void* k = nullptr;
  const void* v = nullptr;
  TokenRange tokens;
};

// Copies rows of a view that are not in memory. Used by one thread at a time.
class RowFetcher {
 public:
  virtual ~RowFetcher() = default;
  // K and V of these tokens of the view, rising, each [tokens][head_dim]; waits for them. False:
  // they cannot be had, and no answer comes of it; the fetcher's owner knows why.
  virtual bool Fetch(std::span<const uint32_t> tokens, std::byte* k, std::byte* v) = 0;
  // All of them, as long as it lives; null: they cannot be had.
  virtual const struct KvView* Whole() = 0;
};

// K and V of consecutive tokens of one (layer, kv_head), as segments in token order without gaps.
struct KvView {
  std::span<const KvSegment> segments;
  uint32_t head_dim = 0;
  DType dtype = DType::kBf16;
  // Null: all rows are in memory. Else segments say which tokens there are, and rows come from it:
  // for ClusterSearch; others are not given such a view.
  RowFetcher* fetcher = nullptr;
  TokenRange tokens() const {
    return segments.empty() ? TokenRange{}
                            : TokenRange{segments.front().tokens.lo, segments.back().tokens.hi};
  }
};

// Queries that share a KV head: all heads of its group, of all rows that share the run.
// Scores are q.k * scale (natural log base). Each query has its own range of tokens.
struct QueryBlock {
  const float* q = nullptr;  // [queries][head_dim] fp32 (exactly representable in the caller's dtype)
  DType q_dtype = DType::kFp32;  // what q was before widening: bf16/fp16 queries allow faster kernels
  uint32_t queries = 0;
  uint32_t head_dim = 0;
  float scale = 1.0f;
  std::span<const TokenRange> ranges;  // [queries]
};

// Scores of one run's tokens, per query.
// Dense: every query has the exact score of each token, in token order.
// Lists: each query has only the tokens that an index found for it, in rising order.
// What is not refined is dropped.
struct CoarseScores {
  TokenRange tokens;            // of the run
  uint32_t nodes = 0;           // dense: tokens
  std::vector<float> score;     // dense: [queries][nodes]; lists: one behind another.
                                // -infinity outside the query's range
  std::vector<uint32_t> first;  // lists: [queries + 1], where each begins; dense: empty
  std::vector<uint32_t> node;   // lists: the token (within the run) of each score
  uint64_t bytes = 0;           // of keys and index data read, shared reads counted once

  bool dense() const { return first.empty(); }
  // One query's scores, and the token (within the run) of the i-th of them.
  std::span<const float> Row(uint32_t query) const {
    const std::span<const float> all(score);
    return dense() ? all.subspan(size_t{query} * nodes, nodes)
                   : all.subspan(first[query], first[query + 1] - first[query]);
  }
  uint32_t NodeOf(uint32_t query, size_t i) const {
    return dense() ? static_cast<uint32_t>(i) : node[first[query] + i];
  }
  // Empty, with the memory kept.
  void Clear() {
    tokens = {};
    nodes = 0;
    bytes = 0;
    score.clear();
    first.clear();
    node.clear();
  }
};

// What a budget allots one run: per query, of the tokens that have a score, those with rank >
// threshold are refined, and of those equal to it the first `ties`. A token's rank is its score; where
// tokens are sampled it is its score plus TokenLift, and it weighs e^max(score, floor).
struct RunAllotment {
  std::vector<float> threshold;    // [queries]
  std::vector<uint32_t> ties;      // [queries]
  std::vector<float> floor;        // [queries]; empty: no query samples
  std::vector<uint64_t> lift_key;  // [queries] of LiftKey, 0: not sampled; empty with `floor`
};

// Tells which tokens of one query are refined, asked in rising order.
class AllottedTokens {
 public:
  AllottedTokens(const RunAllotment& allotment, uint32_t query)
      : threshold_(allotment.threshold[query]), ties_(allotment.ties[query]) {
    if (allotment.lift_key.empty()) return;
    lift_key_ = allotment.lift_key[query];
    floor_ = allotment.floor[query];
  }
  bool Take(uint32_t token, float score) {
    const float rank = lift_key_ == 0 ? score : score + TokenLift(lift_key_, token);
    if (rank > threshold_) return true;
    if (ties_ == 0 || rank != threshold_) return false;
    --ties_;
    return true;
  }
  // Tokens of lower score are not taken.
  float LeastScore() const { return lift_key_ == 0 ? threshold_ : threshold_ - kMostTokenLift; }
  // The log of what a token weighs.
  float Weight(float score) const { return score > floor_ ? score : floor_; }

 private:
  const float threshold_;
  uint32_t ties_;
  uint64_t lift_key_ = 0;
  float floor_ = -std::numeric_limits<float>::infinity();
};

// An index of one immutable run, or what scans any. How it is searched, its own kind says: TokenIndex
// run by run, ClusterIndex all runs of a query at once (cluster_search.h).
// Thread-safe after construction; methods are const and do not block.
class KeyIndex {
 public:
  virtual ~KeyIndex() = default;

  // "exact", "codes", "graph", "clusters", ...
  virtual std::string_view kind() const = 0;

  // Whether it can be of this run, by the run's size alone. An index that was read from bytes is not
  // to be searched with a run that it does not fit.
  virtual bool Fits(const KvView& /*run*/) const { return true; }
};

// An index that finds tokens, with their exact scores, for budgets that choose among these. It
// estimates nothing, so Budget::kError is not for it.
class TokenIndex : public KeyIndex {
 public:
  // Exact attention over every token of run that lies in each query's range; merged into acc.
  // Cost: one pass over K and V for all queries.
  virtual void AttendAll(const KvView& run, const QueryBlock& queries,
                         std::span<Partial> acc) const = 0;

  // First pass of a budgeted query.
  virtual void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const = 0;

  // Second pass: attention over what was allotted, merged into acc. Its bytes are those of both
  // passes.
  virtual void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
                      const RunAllotment& allotment, std::span<Partial> acc) const = 0;
};

// The exact scan: no data of its own, one instance serves every run.
const TokenIndex& ExactScan();
// Another instance.
std::unique_ptr<TokenIndex> MakeExactScan();

}  // namespace quarry
