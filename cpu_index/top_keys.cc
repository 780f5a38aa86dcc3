#include "cpu_index/top_keys.h"

#include <algorithm>
#include <limits>

#include "cpu_index/parallel_for.h"
#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

// Queries that a thread takes at once: their scores of one tile of keys, 128 KiB, stay in the L2
// cache, and the keys are read once for all of them.
constexpr uint32_t kBlockQueries = 64;
constexpr uint32_t kTileTokens = 512;
// Scores whose maximum is compared with what the query has, before any of them is.
constexpr uint32_t kChunk = 64;

struct Scored {
  float score;
  uint32_t token;
};
bool Above(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score > b.score : a.token < b.token;
}

// The largest of what one query was shown, tokens rising.
class Largest {
 public:
  explicit Largest(uint32_t count) : count_(count) { kept_.reserve(4 * size_t{count} + kChunk); }

  void Add(const float* scores, uint32_t n, uint32_t first_token) {
    for (uint32_t lo = 0; lo < n; lo += kChunk) {
      const uint32_t hi = std::min(n, lo + kChunk);
      if (!(Kernels().max(scores + lo, hi - lo) > least_)) continue;
      for (uint32_t t = lo; t < hi; ++t) {
        if (scores[t] > least_) kept_.push_back({scores[t], first_token + t});
      }
      if (kept_.size() >= 4 * size_t{count_}) Shrink();
    }
  }

  void Finish(uint32_t* out) {
    Shrink();
    std::sort(kept_.begin(), kept_.end(), Above);
    for (const Scored& key : kept_) *out++ = key.token;
  }

 private:
  void Shrink() {
    if (kept_.size() <= count_) return;
    std::nth_element(kept_.begin(), kept_.begin() + (count_ - 1), kept_.end(), Above);
    kept_.resize(count_);
    least_ = kept_.back().score;
  }

  const uint32_t count_;
  // A later token whose score equals that of the last one kept comes after it.
  float least_ = -std::numeric_limits<float>::infinity();
  std::vector<Scored> kept_;
};

// Of queries [n][head_dim], exact in bf16.
void FindBlock(const KvView& run, const float* q, const uint16_t* q_bf16, uint32_t n,
               uint32_t count, uint32_t* out) {
  std::vector<Largest> largest(n, Largest(count));
  std::vector<float> scores(size_t{n} * kTileTokens);
  kernels::ScoreTile tile{};
  tile.q = q;
  tile.q_bf16 = q_bf16;
  tile.queries = n;
  tile.head_dim = run.head_dim;
  tile.dtype = static_cast<uint8_t>(run.dtype);
  tile.scale = 1;
  tile.out = scores.data();
  tile.ld_out = kTileTokens;
  for (const KvSegment& segment : run.segments) {
    for (uint32_t lo = segment.tokens.lo; lo < segment.tokens.hi; lo += kTileTokens) {
      tile.tokens = std::min(kTileTokens, segment.tokens.hi - lo);
      tile.k = static_cast<const std::byte*>(segment.k) +
               size_t{lo - segment.tokens.lo} * run.head_dim * DTypeBytes(run.dtype);
      Kernels().score(tile);
      for (uint32_t i = 0; i < n; ++i) {
        largest[i].Add(scores.data() + size_t{i} * kTileTokens, tile.tokens, lo - run.tokens().lo);
      }
    }
  }
  for (uint32_t i = 0; i < n; ++i) largest[i].Finish(out + size_t{i} * count);
}

}  // namespace

std::vector<uint32_t> TopKeys(const KvView& run, std::span<const float> queries, uint32_t count,
                              uint32_t threads) {
  const size_t n = queries.size() / run.head_dim;
  count = std::min(count, run.tokens().size());
  std::vector<uint32_t> out(n * count);
  if (out.empty()) return out;
  std::vector<uint16_t> bf16(n * run.head_dim);
  std::vector<float> rounded(n * run.head_dim);
  for (size_t i = 0; i < bf16.size(); ++i) {
    bf16[i] = FloatToBf16(queries[i]);
    rounded[i] = Bf16ToFloat(bf16[i]);
  }
  ParallelFor(threads, n, kBlockQueries, [&](size_t lo, size_t hi) {
    FindBlock(run, rounded.data() + lo * run.head_dim, bf16.data() + lo * run.head_dim,
              static_cast<uint32_t>(hi - lo), count, out.data() + lo * count);
  });
  return out;
}

}  // namespace quarry
