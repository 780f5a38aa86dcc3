#include "cpu_index/candidates.h"

#include <algorithm>
#include <cstring>

#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "cpu_index/token_set.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

// Rows whose lines are asked for ahead of the one that is copied: about the latency of DRAM.
constexpr size_t kRowsAhead = 8;
// Keys gathered before they are scored: 64 KiB of 256 bytes each, a part of the L2 cache.
constexpr size_t kGatheredKeys = 256;

void Prefetch(const std::byte* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// Scores some keys of one query: gathers their rows, then one pass over the copy.
class GatheredScores {
 public:
  GatheredScores(const KvView& run, const QueryBlock& queries)
      : run_(run),
        queries_(queries),
        rows_(run, KvPart::kKey),
        keys_(kGatheredKeys * rows_.row_bytes()) {
    if (queries.q_dtype != DType::kBf16) return;
    bf16_.resize(size_t{queries.queries} * queries.head_dim);
    for (size_t i = 0; i < bf16_.size(); ++i) bf16_[i] = FloatToBf16(queries.q[i]);
  }

  size_t row_bytes() const { return rows_.row_bytes(); }
  void Score(uint32_t query, std::span<const uint32_t> nodes, float* out) {
    const size_t bytes = rows_.row_bytes();
    for (size_t i = 0; i < std::min(kRowsAhead, nodes.size()); ++i) {
      Prefetch(rows_.At(nodes[i]), bytes);
    }
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (i + kRowsAhead < nodes.size()) Prefetch(rows_.At(nodes[i + kRowsAhead]), bytes);
      std::memcpy(keys_.data() + i * bytes, rows_.At(nodes[i]), bytes);
    }
    kernels::ScoreTile tile{};
    tile.q = queries_.q + size_t{query} * queries_.head_dim;
    tile.q_bf16 = bf16_.empty() ? nullptr : bf16_.data() + size_t{query} * queries_.head_dim;
    tile.queries = 1;
    tile.head_dim = run_.head_dim;
    tile.k = keys_.data();
    tile.tokens = static_cast<uint32_t>(nodes.size());
    tile.dtype = static_cast<uint8_t>(run_.dtype);
    tile.scale = queries_.scale;
    tile.out = out;
    tile.ld_out = nodes.size();
    Kernels().score(tile);
  }

 private:
  const KvView& run_;
  const QueryBlock& queries_;
  const RunRows rows_;
  std::vector<std::byte> keys_;
  std::vector<uint16_t> bf16_;
};

// What one query was allotted: tokens, counted from the first one of the lists, in rising order,
// and the logs of what they weigh.
struct Chosen {
  std::vector<uint32_t> token;
  std::vector<float> weight;
};

void Choose(const CoarseScores& lists, uint32_t query, const RunAllotment& allotment,
            Chosen* out) {
  out->token.clear();
  out->weight.clear();
  const std::span<const float> row = lists.Row(query);
  AllottedTokens allotted(allotment, query);
  for (size_t i = 0; i < row.size(); ++i) {
    const uint32_t token = lists.NodeOf(query, i);
    if (!allotted.Take(lists.tokens.lo + token, row[i])) continue;
    out->token.push_back(token);
    out->weight.push_back(allotted.Weight(row[i]));
  }
}

// acc [head_dim] += sum of weight * value over the chosen tokens, segment by segment.
void AccumulateValues(const KvView& run, const RunRows& values, const Chosen& chosen,
                      float* acc) {
  const uint32_t first = run.tokens().lo;
  std::vector<uint32_t> rows(chosen.token.size());
  for (size_t lo = 0; lo < chosen.token.size();) {
    const KvSegment& segment = values.SegmentOf(chosen.token[lo]);
    size_t hi = lo;
    for (; hi < chosen.token.size() && first + chosen.token[hi] < segment.tokens.hi; ++hi) {
      rows[hi] = first + chosen.token[hi] - segment.tokens.lo;
    }
    kernels::AccumulateTile tile{};
    tile.p = chosen.weight.data() + lo;
    tile.ld_p = hi - lo;
    tile.queries = 1;
    tile.head_dim = run.head_dim;
    tile.v = segment.v;
    tile.rows = rows.data() + lo;
    tile.tokens = static_cast<uint32_t>(hi - lo);
    tile.dtype = static_cast<uint8_t>(run.dtype);
    tile.acc = acc;
    Kernels().accumulate(tile);
    lo = hi;
  }
}

}  // namespace

void ListCandidates(TokenRange run, std::span<const TokenRange> ranges,
                    std::span<std::vector<Candidate>> found, CoarseScores* out) {
  QUARRY_CHECK(ranges.size() == found.size());
  out->Clear();
  out->tokens = run;
  out->nodes = run.size();
  out->first.push_back(0);
  for (size_t i = 0; i < found.size(); ++i) {
    const TokenRange range = Intersect(ranges[i], run);
    std::sort(found[i].begin(), found[i].end(),
              [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    for (const Candidate& candidate : found[i]) {
      if (candidate.token < range.lo || candidate.token >= range.hi) continue;
      out->node.push_back(candidate.token - run.lo);
      out->score.push_back(candidate.score);
    }
    out->first.push_back(static_cast<uint32_t>(out->node.size()));
  }
}

void RescoreCandidates(const KvView& run, const QueryBlock& queries, CoarseScores* lists) {
  QUARRY_CHECK(!lists->dense() && lists->first.size() == queries.queries + 1);
  TokenSet touched(lists->tokens.size());
  GatheredScores scores(run, queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    for (size_t lo = lists->first[i]; lo < lists->first[i + 1]; lo += kGatheredKeys) {
      const size_t n = std::min(kGatheredKeys, lists->first[i + 1] - lo);
      const std::span<const uint32_t> nodes = std::span(lists->node).subspan(lo, n);
      scores.Score(i, nodes, lists->score.data() + lo);
      for (uint32_t node : nodes) touched.Add(node);
    }
  }
  lists->bytes += touched.size() * scores.row_bytes();
}

void AttendCandidates(const KvView& run, const QueryBlock& queries, const CoarseScores& lists,
                      const RunAllotment& allotment, std::span<Partial> acc) {
  QUARRY_CHECK(acc.size() == queries.queries && allotment.threshold.size() == queries.queries &&
               allotment.ties.size() == queries.queries);
  QUARRY_CHECK(!lists.dense() && lists.first.size() == queries.queries + 1);
  if (queries.queries == 0) return;
  TokenSet touched(lists.tokens.size());
  const RunRows values(run, KvPart::kValue);
  std::vector<float> sum(run.head_dim);
  Chosen chosen;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    Choose(lists, i, allotment, &chosen);
    if (chosen.token.empty()) continue;
    for (uint32_t token : chosen.token) touched.Add(token);
    std::fill(sum.begin(), sum.end(), 0.0f);
    Partial part;
    part.max = Kernels().max(chosen.weight.data(), chosen.weight.size());
    part.sum = Kernels().exp_sum(chosen.weight.data(), chosen.weight.size(), part.max);
    part.tokens = chosen.token.size();
    part.acc = sum;
    AccumulateValues(run, values, chosen, sum.data());
    acc[i].Merge(part);
  }
  acc[0].bytes += lists.bytes + touched.size() * values.row_bytes();
}

}  // namespace quarry
