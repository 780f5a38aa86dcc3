// The exact scan: every key of a run is read and scored.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu_index/attend_pass.h"
#include "cpu_index/key_index.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

// Tokens scored at a time: a block's strip, so that packing the queries is shared by many keys
// while the scores of sixteen queries (16 KiB) stay in the L1 cache.
constexpr uint32_t kTileTokens = 256;
// Tokens gathered at a time by a budget's second pass: one bit each in a word.
constexpr uint32_t kGatherTokens = 64;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// The queries as the kernels want them.
class PreparedQueries {
 public:
  explicit PreparedQueries(const QueryBlock& block) : block_(block) {
    QUARRY_CHECK(block.ranges.size() == block.queries);
    if (block.q_dtype != DType::kBf16) return;
    bf16_.resize(size_t{block.queries} * block.head_dim);
    for (size_t i = 0; i < bf16_.size(); ++i) bf16_[i] = FloatToBf16(block.q[i]);
  }

  // Scores tokens [first, first + n) of a segment into out [queries][ld_out]; `next` is fetched.
  void Score(const KvView& run, const KvSegment& segment, uint32_t first, uint32_t n,
             const void* next, float* out, size_t ld_out) const {
    const size_t row_bytes = size_t{run.head_dim} * DTypeBytes(run.dtype);
    kernels::ScoreTile tile{};
    tile.q = block_.q;
    tile.q_bf16 = bf16_.empty() ? nullptr : bf16_.data();
    tile.queries = block_.queries;
    tile.head_dim = run.head_dim;
    tile.k = static_cast<const char*>(segment.k) + (first - segment.tokens.lo) * row_bytes;
    tile.tokens = n;
    tile.dtype = static_cast<uint8_t>(run.dtype);
    tile.scale = block_.scale;
    tile.out = out;
    tile.ld_out = ld_out;
    tile.next = next;
    Kernels().score(tile);
  }

 private:
  const QueryBlock& block_;
  std::vector<uint16_t> bf16_;
};

// Masks the scores of tokens [first, first + n) that lie outside the range; true if any is left.
bool Mask(TokenRange range, uint32_t first, uint32_t n, float* scores) {
  TokenRange in = Intersect(range, {first, first + n});
  if (in.empty()) {
    std::fill_n(scores, n, kMasked);
    return false;
  }
  std::fill(scores, scores + (in.lo - first), kMasked);
  std::fill(scores + (in.hi - first), scores + n, kMasked);
  return true;
}

// Running state of several queries, with one buffer of accumulators; merged out at the end.
class OnlineSoftmax {
 public:
  OnlineSoftmax(uint32_t queries, uint32_t head_dim)
      : head_dim_(head_dim),
        max_(queries, kMasked),
        sum_(queries, 0.0f),
        tokens_(queries, 0),
        acc_(size_t{queries} * head_dim, 0.0f) {}

  // Turns masked scores of `n` tokens into weights e^(score - max), rescaling what came before.
  void Weigh(uint32_t query, float* scores, uint32_t n) {
    const kernels::Table& kernels = Kernels();
    float largest = kernels.max(scores, n);
    if (largest > max_[query]) {
      if (max_[query] != kMasked) {
        float factor = std::exp(max_[query] - largest);
        kernels.scale(acc(query), head_dim_, factor);
        sum_[query] *= factor;
      }
      max_[query] = largest;
    }
    sum_[query] += kernels.exp_sum(scores, n, max_[query]);
  }

  float* acc(uint32_t query) { return acc_.data() + size_t{query} * head_dim_; }
  void CountTokens(uint32_t query, uint64_t tokens) { tokens_[query] += tokens; }

  void MergeInto(std::span<Partial> out) {
    for (size_t i = 0; i < out.size(); ++i) {
      Partial mine;
      mine.max = max_[i];
      mine.sum = sum_[i];
      mine.tokens = tokens_[i];
      mine.acc = std::span(acc_).subspan(i * head_dim_, head_dim_);
      out[i].Merge(mine);
    }
  }

 private:
  const uint32_t head_dim_;
  std::vector<float> max_, sum_;
  std::vector<uint64_t> tokens_;
  std::vector<float> acc_;
};

kernels::AccumulateTile ValuesOf(const KvView& run, const KvSegment& segment, uint32_t first) {
  kernels::AccumulateTile tile{};
  tile.head_dim = run.head_dim;
  tile.v = static_cast<const char*>(segment.v) +
           size_t{first - segment.tokens.lo} * run.head_dim * DTypeBytes(run.dtype);
  tile.dtype = static_cast<uint8_t>(run.dtype);
  return tile;
}

// Where the next tile's keys lie: behind this one, or at the start of the next segment.
const void* NextKeys(const KvView& run, size_t segment, uint32_t next_token) {
  const KvSegment& s = run.segments[segment];
  if (next_token < s.tokens.hi) {
    return static_cast<const char*>(s.k) +
           size_t{next_token - s.tokens.lo} * run.head_dim * DTypeBytes(run.dtype);
  }
  return segment + 1 < run.segments.size() ? run.segments[segment + 1].k : nullptr;
}

class ExactScanIndex final : public TokenIndex {
 public:
  std::string_view kind() const override { return "exact"; }

  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override {
    QUARRY_CHECK(acc.size() == queries.queries && queries.ranges.size() == queries.queries);
    if (queries.queries == 0) return;
    AttendPass pass(queries, static_cast<uint8_t>(run.dtype), Kernels().attend_scratch_bytes,
                    Kernels().attend);
    const TokenRange hull = Hull(queries);
    uint64_t read = 0;
    for (const KvSegment& segment : run.segments) {
      const uint32_t wanted = Intersect(segment.tokens, hull).size();
      if (wanted == 0) continue;
      pass.Add({segment.k, segment.v, segment.tokens.lo, segment.tokens.size()}, wanted, acc);
      read += wanted;
    }
    pass.Finish(acc);
    for (uint32_t i = 0; i < queries.queries; ++i) {
      acc[i].tokens += Intersect(queries.ranges[i], run.tokens()).size();
    }
    acc[0].bytes += read * 2 * run.head_dim * DTypeBytes(run.dtype);
  }

  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override {
    out->Clear();
    out->tokens = run.tokens();
    out->nodes = out->tokens.size();
    out->score.assign(size_t{queries.queries} * out->nodes, kMasked);
    if (queries.queries == 0) return;
    const PreparedQueries prepared(queries);
    const TokenRange hull = Hull(queries);
    for (size_t s = 0; s < run.segments.size(); ++s) {
      const KvSegment& segment = run.segments[s];
      const TokenRange wanted = Intersect(segment.tokens, hull);
      out->bytes += uint64_t{wanted.size()} * run.head_dim * DTypeBytes(run.dtype);
      for (uint32_t t = wanted.lo; t < wanted.hi; t += kTileTokens) {
        const uint32_t n = std::min(kTileTokens, wanted.hi - t);
        float* at = out->score.data() + (t - out->tokens.lo);
        prepared.Score(run, segment, t, n, NextKeys(run, s, t + n), at, out->nodes);
        for (uint32_t i = 0; i < queries.queries; ++i) {
          Mask(queries.ranges[i], t, n, at + size_t{i} * out->nodes);
        }
      }
    }
  }

  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
              const RunAllotment& allotment, std::span<Partial> acc) const override {
    QUARRY_CHECK(acc.size() == queries.queries && allotment.threshold.size() == queries.queries &&
                 allotment.ties.size() == queries.queries);
    if (queries.queries == 0) return;
    OnlineSoftmax softmax(queries.queries, run.head_dim);
    std::vector<AllottedTokens> allotted;
    for (uint32_t i = 0; i < queries.queries; ++i) allotted.emplace_back(allotment, i);
    std::vector<uint32_t> rows(kGatherTokens);
    std::vector<float> weights(kGatherTokens);
    uint64_t value_rows = 0;
    const TokenRange hull = Hull(queries);
    for (const KvSegment& segment : run.segments) {
      const TokenRange wanted = Intersect(segment.tokens, hull);
      for (uint32_t t = wanted.lo; t < wanted.hi; t += kGatherTokens) {
        const uint32_t n = std::min(kGatherTokens, wanted.hi - t);
        uint64_t touched = 0;  // a bit per token of the tile: rows shared by queries count once
        for (uint32_t i = 0; i < queries.queries; ++i) {
          const float* scores =
              coarse.score.data() + size_t{i} * coarse.nodes + (t - coarse.tokens.lo);
          // Mostly a tile has nothing that is wanted, and one comparison shows it.
          if (Kernels().max(scores, n) < allotted[i].LeastScore()) continue;
          uint32_t kept = 0;
          for (uint32_t j = 0; j < n; ++j) {
            if (!allotted[i].Take(t + j, scores[j])) continue;
            rows[kept] = j;
            weights[kept++] = allotted[i].Weight(scores[j]);
            touched |= uint64_t{1} << j;
          }
          if (kept == 0) continue;
          softmax.Weigh(i, weights.data(), kept);
          softmax.CountTokens(i, kept);
          kernels::AccumulateTile tile = ValuesOf(run, segment, t);
          tile.p = weights.data();
          tile.ld_p = kGatherTokens;
          tile.queries = 1;
          tile.rows = rows.data();
          tile.tokens = kept;
          tile.acc = softmax.acc(i);
          Kernels().accumulate(tile);
        }
        value_rows += static_cast<uint64_t>(__builtin_popcountll(touched));
      }
    }
    softmax.MergeInto(acc);
    acc[0].bytes += coarse.bytes + value_rows * run.head_dim * DTypeBytes(run.dtype);
  }
};

static_assert(kGatherTokens <= 64, "Refine marks a tile's rows in one word");

}  // namespace

std::unique_ptr<TokenIndex> MakeExactScan() { return std::make_unique<ExactScanIndex>(); }

const TokenIndex& ExactScan() {
  static const ExactScanIndex index;
  return index;
}

}  // namespace quarry
