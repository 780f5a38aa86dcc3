#include "gpu/sparse/sparse_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu_index/partial.h"
#include "cpu_index/simd.h"
#include "proto/check.h"

namespace quarry {
namespace {

// Queries that share a pass over keys: as in the host device's dense attention.
constexpr uint32_t kQueriesPerPass = 64;
// Keys attended before sums are merged, so that rounding errors stay as small as in the exact scan.
constexpr uint32_t kKeysPerPass = 8192;

// A head's columns, compacted.
struct CompactKv {
  std::vector<std::byte> k, v;

  void Fill(const LayerKv& layer, uint32_t head, std::span<const uint32_t> columns) {
    const size_t row = layer.row_bytes();
    k.resize(columns.size() * row);
    v.resize(columns.size() * row);
    for (size_t c = 0; c < columns.size(); ++c) {
      std::memcpy(&k[c * row], layer.Keys(head) + columns[c] * row, row);
      std::memcpy(&v[c * row], layer.Values(head) + columns[c] * row, row);
    }
  }
};

// Some queries of one head, and their running softmax.
class Pass {
 public:
  Pass(const LayerKv& layer, uint32_t queries)
      : queries_(queries),
        d_(layer.head_dim),
        row_bytes_(layer.row_bytes()),
        q_(queries * d_),
        acc_(queries * d_),
        sum_acc_(queries * d_, 0.0f),
        lo_(queries, 0),
        hi_(queries),
        max_(queries),
        sum_(queries),
        partials_(queries) {
    for (uint32_t i = 0; i < queries; ++i) {
      partials_[i].acc = std::span(sum_acc_).subspan(i * d_, d_);
    }
    run_.q = q_.data();
    run_.queries = queries;
    run_.head_dim = layer.head_dim;
    run_.dtype = static_cast<uint8_t>(layer.dtype);
    run_.q_parts = 3;  // fp32 queries
    run_.scale = 1.0f / std::sqrt(static_cast<float>(d_));
    run_.lo = lo_.data();
    run_.hi = hi_.data();
    run_.max = max_.data();
    run_.sum = sum_.data();
    run_.acc = acc_.data();
    scratch_.resize(Kernels().attend_scratch_bytes(run_) / sizeof(Line) + 1);
    run_.scratch = scratch_.data();
  }

  float* q(uint32_t i) { return &q_[i * d_]; }
  // Query i sees keys below hi.
  void See(uint32_t i, uint32_t hi) { hi_[i] = hi; }

  // Keys [range.lo, range.hi) of k and v, which hold keys from 0 on.
  void Attend(const std::byte* k, const std::byte* v, std::span<const TokenRange> ranges) {
    uint32_t keys = 0;
    for (const TokenRange& range : ranges) {
      for (uint32_t lo = range.lo; lo < range.hi;) {
        if (keys == kKeysPerPass) Flush(&keys);
        const uint32_t n = std::min(range.hi - lo, kKeysPerPass - keys);
        segments_.push_back({k + lo * row_bytes_, v + lo * row_bytes_, lo, n});
        keys += n;
        lo += n;
      }
    }
    if (keys > 0) Flush(&keys);
  }

  float Finish(uint32_t i, float* o) const { return partials_[i].Finish(std::span(o, d_)); }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };

  void Flush(uint32_t* keys) {
    run_.segments = segments_.data();
    run_.segment_count = segments_.size();
    Kernels().attend(run_);
    for (uint32_t i = 0; i < queries_; ++i) {
      Partial part;
      part.max = max_[i];
      part.sum = sum_[i];
      part.acc = std::span(acc_).subspan(i * d_, d_);
      partials_[i].Merge(part);
    }
    segments_.clear();
    *keys = 0;
  }

  const uint32_t queries_;
  const size_t d_, row_bytes_;
  std::vector<float> q_, acc_, sum_acc_;
  std::vector<uint32_t> lo_, hi_;
  std::vector<float> max_, sum_;
  std::vector<Partial> partials_;
  std::vector<kernels::AttendSegment> segments_;
  std::vector<Line> scratch_;
  kernels::AttendRun run_{};
};

// Rows [first, last) of what is attended, all of one row tile.
struct Task {
  uint32_t tile = 0, first = 0, last = 0;
};

uint32_t TokenOf(const SparseAttention& a, uint32_t row) {
  return a.tokens.empty() ? a.index->first_token + row : a.tokens[row];
}

std::vector<Task> Tasks(const SparseAttention& a) {
  const auto rows = a.tokens.empty() ? a.index->rows : static_cast<uint32_t>(a.tokens.size());
  std::vector<Task> tasks;
  for (uint32_t r = 0; r < rows; ++r) {
    const uint32_t token = TokenOf(a, r);
    QUARRY_CHECK(token >= a.index->first_token && token - a.index->first_token < a.index->rows);
    const uint32_t tile = (token - a.index->first_token) / kRowTile;
    QUARRY_CHECK(tasks.empty() || tile >= tasks.back().tile);
    if (tasks.empty() || tasks.back().tile != tile) tasks.push_back({tile, r, r});
    tasks.back().last = r + 1;
  }
  // The last rows attend the most: they come first, so that no thread is left alone with them.
  std::reverse(tasks.begin(), tasks.end());
  return tasks;
}

SparseWork AttendTask(const SparseAttention& a, const Task& task, uint32_t head,
                      const CompactKv& compact) {
  const size_t d = a.layer.head_dim;
  RowTileKeys keys;
  RowTileKeysOf(*a.index, head, task.tile, &keys);
  std::vector<TokenRange> columns;
  ColumnsOutside(a.index->ColumnsOf(head), keys.columns, keys.ranges, &columns);
  for (uint32_t first = task.first; first < task.last; first += kQueriesPerPass) {
    const uint32_t n = std::min(kQueriesPerPass, task.last - first);
    Pass pass(a.layer, n);
    for (uint32_t i = 0; i < n; ++i) {
      std::memcpy(pass.q(i), a.q + (size_t{first + i} * a.layer.heads + head) * d,
                  d * sizeof(float));
      pass.See(i, TokenOf(a, first + i) + 1);
    }
    pass.Attend(a.layer.Keys(head), a.layer.Values(head), keys.ranges);
    // Columns outside the ranges are before the row tile: every row sees them, whatever their
    // places in the compacted K and V.
    for (uint32_t i = 0; i < n; ++i) pass.See(i, keys.columns);
    pass.Attend(compact.k.data(), compact.v.data(), columns);
    for (uint32_t i = 0; i < n; ++i) {
      const size_t at = size_t{first + i} * a.layer.heads + head;
      a.lse[at] = pass.Finish(i, a.o + at * d);
    }
  }
  SparseWork work{keys.tiles(), 0};
  for (const TokenRange& range : keys.ranges) work.keys += range.size();
  for (const TokenRange& part : columns) work.keys += part.size();
  return work;
}

}  // namespace

SparseWork AttendSparse(const SparseAttention& a, ThreadTeam* team) {
  QUARRY_CHECK(a.index->heads == a.layer.heads && a.layer.kv.tokens.lo == 0 &&
               a.layer.kv.tokens.hi >= a.index->first_token + a.index->rows);
  std::vector<CompactKv> compact(a.layer.heads);
  team->For(compact.size(), [&](size_t head) {
    compact[head].Fill(a.layer, static_cast<uint32_t>(head),
                       a.index->ColumnsOf(static_cast<uint32_t>(head)));
  });
  const std::vector<Task> tasks = Tasks(a);
  std::atomic<uint64_t> tiles{0}, keys{0};
  team->For(tasks.size() * a.layer.heads, [&](size_t i) {
    const auto head = static_cast<uint32_t>(i % a.layer.heads);
    const SparseWork work = AttendTask(a, tasks[i / a.layer.heads], head, compact[head]);
    tiles += work.tiles;
    keys += work.keys;
  });
  return {tiles, keys};
}

}  // namespace quarry
