// How a clustered index attends: tokens exactly or by their rows, all others by estimates.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu_index/cluster_search.h"
#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
// Leaves of less than this share of the mass, by the root of their number, stand for their super.
constexpr float kNegligible = 1e-3f;

// acc += weight * slope * query
void AddSlope(std::span<const float> slope, std::span<const float> query, float weight,
              std::span<float> acc) {
  kernels::ScoreTile tile{};
  tile.q = query.data();
  tile.queries = 1;
  tile.head_dim = static_cast<uint32_t>(query.size());
  tile.k = slope.data();
  tile.tokens = static_cast<uint32_t>(acc.size());
  tile.dtype = kernels::kFp32;
  tile.scale = weight;
  std::vector<float> along(acc.size());
  tile.out = along.data();
  tile.ld_out = along.size();
  Kernels().score(tile);
  for (size_t d = 0; d < acc.size(); ++d) acc[d] += along[d];
}

}  // namespace

// e^(score - shift) of everything that is estimated or read by rows, [queries] one behind another.
struct ClusterIndex::Weights {
  const Rows& rows;
  std::vector<float> shift;         // [queries]; none: there is nothing
  std::vector<float> node;          // [nodes] of the query that is being weighed
  std::vector<float> token;         // [queries][rows' places]
  std::vector<uint32_t> leaves;     // opened ones, closed ones, and others that rows lie in
  std::vector<uint32_t> row_leaf;   // [rows' places] where in these
  std::vector<float> leaf;          // [queries][leaves]
  std::vector<float> super;         // [queries][supers]
  // [queries] of what is estimated by tokens' codes, by closed leaves, by closed supers.
  std::vector<float> by_code, by_leaf, by_super;
  std::vector<float> doubt;  // [queries] as Partial's
};

std::vector<uint32_t> ClusterIndex::Allotted(const CoarseScores& coarse,
                                             const RunAllotment& allotment) {
  std::vector<uint8_t> marks(coarse.nodes);
  for (uint32_t i = 0; i < allotment.threshold.size(); ++i) {
    const float* const row = coarse.Row(i).data();
    const float threshold = allotment.threshold[i];
    // Groups are taken where everything is to be exact, else they were closed for good.
    const bool groups = allotment.exact.empty() || allotment.exact[i] == kNone;
    const size_t end = groups ? marks.size() : coarse.stretches[kTokens].end;
    for (size_t e = 0; e < end; ++e) marks[e] |= row[e] > threshold ? 1 : 0;
    uint32_t ties = threshold == kNone ? 0 : allotment.ties[i];
    for (size_t e = 0; e < end && ties > 0; ++e) {
      if (row[e] != threshold) continue;
      marks[e] = 1;
      --ties;
    }
  }
  std::vector<uint32_t> out;
  for (uint32_t e = 0; e < marks.size(); ++e) {
    if (marks[e] != 0) out.push_back(e);
  }
  return out;
}

std::vector<uint32_t> ClusterIndex::PlacesOf(const CoarseScores& coarse,
                                             std::span<const uint32_t> taken) const {
  const Listed listed = NodesOf(coarse);
  std::vector<uint32_t> out;
  size_t tokens_end = 0;  // groups lie among the tokens before them
  for (uint32_t e : taken) {
    const TokenRange places = Places(listed, e);
    for (uint32_t p = places.lo; p < places.hi; ++p) out.push_back(p);
    if (e < listed.tokens()) tokens_end = out.size();
  }
  std::sort(out.begin() + static_cast<ptrdiff_t>(tokens_end), out.end());
  std::inplace_merge(out.begin(), out.begin() + static_cast<ptrdiff_t>(tokens_end), out.end());
  return out;
}

void ClusterIndex::Selected(const CoarseScores& coarse, const RunAllotment& allotment,
                            uint32_t query, std::vector<uint32_t>* out) const {
  CoarseScores one = coarse;
  one.score.assign(coarse.Row(query).begin(), coarse.Row(query).end());
  const RunAllotment own{{allotment.threshold[query]}, {allotment.ties[query]}, {}};
  for (uint32_t place : PlacesOf(one, Allotted(one, own))) out->push_back(p_.order[place]);
}

void ClusterIndex::ScoreRows(const KvView& run, const QueryBlock& queries, Rows* rows) const {
  const QueryBasis::Coordinates at = p_.basis.EncodeQueries(queries);
  const size_t n = rows->places.size();
  rows->score.resize(queries.queries * n);
  p_.key_rows.Score(p_.key_rows.Prepare(at.of, queries.queries), rows->places, rows->score);
  rows->bytes += p_.key_rows.BytesOf(rows->places);
  // Rows are around their leaf's centre: these are scored once more, by blocks.
  std::vector<uint32_t> blocks, block_of(n);
  for (size_t r = 0; r < n; ++r) {
    const uint32_t block = rows->places[r] / kSuperRows;
    if (blocks.empty() || blocks.back() != block) blocks.push_back(block);
    block_of[r] = static_cast<uint32_t>(blocks.size() - 1);
  }
  std::vector<NodeLevel::Query> prepared;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    prepared.push_back(
        p_.leaves.Prepare(at.Row(i).first(p_.codes.basis().rank), at.mean_score[i]));
  }
  const size_t row = blocks.size() * NodeLevel::kBlockNodes;
  std::vector<float> centre(queries.queries * row);
  p_.leaves.Score(prepared, blocks.data(), static_cast<uint32_t>(blocks.size()), centre);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const TokenRange range = queries.ranges[i];
    const bool whole = range.lo <= run.tokens().lo && range.hi >= run.tokens().hi;
    for (size_t r = 0; r < n; ++r) {
      const uint32_t place = rows->places[r];
      float& score = rows->score[i * n + r];
      score = score * Bf16ToFloat(p_.scale[place]) +
              centre[i * row + block_of[r] * kLeavesPerSuper + place / kLeafRows % kLeavesPerSuper];
      const uint32_t token = run.tokens().lo + p_.order[place];
      if (!whole && (token < range.lo || token >= range.hi)) score = kNone;
    }
  }
}

// Gathered in the order of tokens, so that what a query may see lies together, and attended like
// any other run.
void ClusterIndex::AttendExactly(const KvView& run, const QueryBlock& queries,
                                 std::span<const uint32_t> places, std::span<Partial> acc) const {
  constexpr uint32_t kTogether = 512, kAhead = 8;
  const RunRows keys(run, KvPart::kKey), values(run, KvPart::kValue);
  const size_t row = size_t{run.head_dim} * DTypeBytes(run.dtype);
  std::vector<uint32_t> tokens;
  for (uint32_t p : places) tokens.push_back(p_.order[p]);
  std::sort(tokens.begin(), tokens.end());
  const size_t most = std::min<size_t>(kTogether, tokens.size());
  std::vector<std::byte> k(most * row), v(most * row);
  std::vector<TokenRange> ranges(queries.queries);
  for (size_t lo = 0; lo < tokens.size(); lo += kTogether) {
    const std::span<const uint32_t> some =
        std::span(tokens).subspan(lo, std::min<size_t>(kTogether, tokens.size() - lo));
    for (size_t t = 0; t < some.size(); ++t) {
      const uint32_t ahead = some[std::min(t + kAhead, some.size() - 1)];
      for (size_t line = 0; line < row; line += 64) {
        __builtin_prefetch(keys.At(ahead) + line);
        __builtin_prefetch(values.At(ahead) + line);
      }
      std::memcpy(k.data() + t * row, keys.At(some[t]), row);
      std::memcpy(v.data() + t * row, values.At(some[t]), row);
    }
    const auto place = [&](uint32_t token) {
      const uint32_t within = token - std::min(token, run.tokens().lo);
      return static_cast<uint32_t>(std::lower_bound(some.begin(), some.end(), within) - some.begin());
    };
    for (uint32_t i = 0; i < queries.queries; ++i) {
      ranges[i] = {place(queries.ranges[i].lo), place(queries.ranges[i].hi)};
    }
    const KvSegment segment{k.data(), v.data(), {0, static_cast<uint32_t>(some.size())}};
    QueryBlock block = queries;
    block.ranges = ranges;
    ExactScan().AttendAll({{&segment, 1}, run.head_dim, run.dtype}, block, acc);
  }
}

void ClusterIndex::Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
                          const RunAllotment& allotment, std::span<Partial> acc) const {
  const std::vector<uint32_t> taken = Allotted(coarse, allotment);
  Rows rows;
  rows.places = PlacesOf(coarse, taken);
  const size_t n = rows.places.size();
  std::vector<uint32_t> exact;
  if (allotment.exact.empty()) {
    exact = rows.places;
    rows.score.assign(queries.queries * n, kNone);
  } else {
    ScoreRows(run, queries, &rows);
    for (size_t r = 0; r < n; ++r) {
      bool above = false;
      for (uint32_t i = 0; i < queries.queries; ++i) {
        // By its code or by its row: what was counted on, and what turned out. Groups are only taken
        // where everything is exact, so entries are rows.
        const bool counted = taken.size() == n && coarse.Row(i)[taken[r]] > allotment.exact[i];
        above |= counted || rows.score[i * n + r] > allotment.exact[i];
      }
      if (!above) continue;
      exact.push_back(rows.places[r]);
      for (uint32_t i = 0; i < queries.queries; ++i) rows.score[i * n + r] = kNone;
    }
    for (uint32_t i = 0; i < queries.queries; ++i) acc[i].tokens += n - exact.size();
  }
  acc[0].bytes += coarse.bytes + rows.bytes;
  AttendExactly(run, queries, exact, acc);
  Estimate(queries, coarse, taken, rows, acc);
}

void ClusterIndex::Estimate(const QueryBlock& queries, const CoarseScores& coarse,
                            std::span<const uint32_t> taken, const Rows& rows,
                            std::span<Partial> acc) const {
  const uint32_t supers = p_.supers.nodes();
  Weights w{.rows = rows};
  ListLeaves(NodesOf(coarse), &w);
  w.token = rows.score;
  w.leaf.resize(queries.queries * w.leaves.size());
  w.super.resize(size_t{queries.queries} * supers);
  for (auto* by : {&w.by_code, &w.by_leaf, &w.by_super}) by->resize(queries.queries);
  std::vector<float> o(size_t{queries.queries} * queries.head_dim);
  std::vector<Partial> parts(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    WeighNodes(coarse, taken, i, &w);
    parts[i].acc = std::span(o).subspan(size_t{i} * queries.head_dim, queries.head_dim);
    parts[i].max = w.shift[i];
    parts[i].doubt = w.doubt[i];
    for (uint32_t s = 0; s < supers; ++s) parts[i].sum += w.super[size_t{i} * supers + s];
  }
  AddValues(queries, w, parts);
  AddSlopes(queries, w, parts);
  for (uint32_t i = 0; i < queries.queries; ++i) acc[i].Merge(parts[i]);
}

void ClusterIndex::ListLeaves(const Listed& listed, Weights* w) const {
  w->leaves.assign(listed.opened.begin(), listed.opened.end());
  w->leaves.insert(w->leaves.end(), listed.leaves.begin(), listed.leaves.end());
  std::vector<uint32_t> at(p_.leaves.nodes(), ~0u);
  for (uint32_t l = 0; l < w->leaves.size(); ++l) at[w->leaves[l]] = l;
  for (uint32_t place : w->rows.places) {
    uint32_t& leaf = at[place / kLeafRows];
    if (leaf == ~0u) {
      leaf = static_cast<uint32_t>(w->leaves.size());
      w->leaves.push_back(place / kLeafRows);
    }
    w->row_leaf.push_back(leaf);
  }
}

// Every token weighs in its leaf's mean, every leaf in its super's; rows add differences.
void ClusterIndex::WeighNodes(const CoarseScores& coarse, std::span<const uint32_t> taken,
                              uint32_t query, Weights* w) const {
  const Listed listed = NodesOf(coarse);
  const size_t rows = w->rows.places.size();
  const std::span<const float> scores = coarse.Row(query);
  const std::span<float> token = std::span(w->token).subspan(query * rows, rows);
  w->node.assign(scores.begin(), scores.end());
  for (uint32_t e : taken) w->node[e] = kNone;
  w->shift.push_back(std::max(Kernels().max(w->node.data(), w->node.size()),
                              Kernels().max(token.data(), rows)));
  const float shift = w->shift.back() == kNone ? 0 : w->shift.back();
  Kernels().exp_sum(w->node.data(), w->node.size(), shift);
  Kernels().exp_sum(token.data(), rows, shift);
  const float* node = w->node.data();
  float* const leaf = w->leaf.data() + query * w->leaves.size();
  float* const super = w->super.data() + size_t{query} * p_.supers.nodes();
  float codes = 0, token_rows = 0;  // sums of squares
  for (size_t l = 0; l < listed.opened.size(); ++l, node += kLeafRows) {
    float sum = 0;
    for (uint32_t t = 0; t < kLeafRows; ++t) {
      sum += node[t];
      codes += node[t] * node[t];
    }
    leaf[l] = sum;
    w->by_code[query] += sum;
  }
  for (size_t l = 0; l < listed.leaves.size(); ++l, ++node) {
    const float weight = *node * static_cast<float>(p_.leaves.count(listed.leaves[l]));
    leaf[listed.opened.size() + l] = weight;
    w->by_leaf[query] += weight;
  }
  for (size_t r = 0; r < rows; ++r) {
    leaf[w->row_leaf[r]] += token[r];
    token_rows += token[r] * token[r];
  }
  for (size_t l = 0; l < w->leaves.size(); ++l) super[w->leaves[l] / kLeavesPerSuper] += leaf[l];
  for (uint32_t s : listed.supers) {
    const float weight = *node++ * static_cast<float>(p_.supers.count(s));
    super[s] += weight;
    w->by_super[query] += weight;
  }
  // The stretches' doubts, by e^score of a whole node.
  const float* const doubt = coarse.doubt.data() + size_t{query} * kStretches;
  const auto of_token = [&](Stretch stretch) {
    return std::exp(doubt[stretch]) / static_cast<float>(coarse.stretches[stretch].weight);
  };
  const float token_doubt = of_token(kTokens), row_doubt = token_doubt * coarse.refined_doubt;
  const float groups = token_doubt * coarse.common_doubt * w->by_code[query] +
                       of_token(kFullLeaves) * w->by_leaf[query] +
                       of_token(kFullSupers) * w->by_super[query];
  w->doubt.push_back(token_doubt * token_doubt * codes + row_doubt * row_doubt * token_rows +
                     groups * groups);
}

void ClusterIndex::AddValues(const QueryBlock& queries, const Weights& w,
                             std::span<Partial> parts) const {
  const uint32_t count = queries.queries, supers = p_.supers.nodes();
  std::vector<float> sums(size_t{count} * queries.head_dim);
  p_.token_values.AddWeighted(w.rows.places, w.token, count, sums);
  parts[0].bytes += p_.token_values.BytesOf(w.rows.places);
  AddLeafValues(queries, w, sums, parts);
  kernels::AccumulateTile tile{};
  tile.p = w.super.data();
  tile.ld_p = supers;
  tile.queries = count;
  tile.head_dim = queries.head_dim;
  tile.v = p_.super_values.data();
  tile.tokens = supers;
  tile.dtype = kernels::kBf16;
  tile.acc = sums.data();
  Kernels().accumulate(tile);
  parts[0].bytes += p_.super_values.size() * sizeof(uint16_t);
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t d = 0; d < queries.head_dim; ++d) {
      parts[i].acc[d] += sums[size_t{i} * queries.head_dim + d];
    }
  }
}

// Of the leaves that matter to some query.
void ClusterIndex::AddLeafValues(const QueryBlock& queries, const Weights& w, std::span<float> sums,
                                 std::span<Partial> parts) const {
  const uint32_t count = queries.queries;
  const size_t n = w.leaves.size();
  const float least = kNegligible / std::sqrt(static_cast<float>(n + 1));
  std::vector<uint8_t> matters(n);
  for (uint32_t i = 0; i < count; ++i) {
    const float from = least * parts[i].sum;
    for (size_t l = 0; l < n; ++l) matters[l] |= w.leaf[i * n + l] > from ? 1 : 0;
  }
  std::vector<uint32_t> leaves;
  std::vector<size_t> at;
  for (size_t l = 0; l < n; ++l) {
    if (matters[l] == 0) continue;
    leaves.push_back(w.leaves[l]);
    at.push_back(l);
  }
  std::vector<float> weight(count * at.size());
  for (uint32_t i = 0; i < count; ++i) {
    for (size_t l = 0; l < at.size(); ++l) weight[i * at.size() + l] = w.leaf[i * n + at[l]];
  }
  p_.leaf_values.AddWeighted(leaves, weight, count, sums);
  parts[0].bytes += p_.leaf_values.BytesOf(leaves);
}

void ClusterIndex::AddSlopes(const QueryBlock& queries, const Weights& w,
                             std::span<Partial> parts) const {
  std::vector<float> q(queries.head_dim);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    for (uint32_t d = 0; d < queries.head_dim; ++d) {
      q[d] = queries.q[size_t{i} * queries.head_dim + d] * queries.scale;
    }
    if (w.by_code[i] > 0) AddSlope(token_slope_, q, w.by_code[i], parts[i].acc);
    if (w.by_leaf[i] > 0) AddSlope(inside_leaf_.slope, q, w.by_leaf[i], parts[i].acc);
    if (w.by_super[i] > 0) AddSlope(inside_super_.slope, q, w.by_super[i], parts[i].acc);
  }
}

}  // namespace quarry
