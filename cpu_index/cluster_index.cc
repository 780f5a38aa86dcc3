#include "cpu_index/cluster_index.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/candidates.h"
#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Calls f(entry, taken) for the entries of one query's list.
template <typename F>
void ForEntries(const CoarseScores& coarse, const RunAllotment& allotment, uint32_t query, F&& f) {
  uint32_t ties = allotment.ties[query];
  for (size_t at = coarse.first[query]; at < coarse.first[query + 1]; ++at) {
    const bool tie = coarse.score[at] == allotment.threshold[query] && ties > 0;
    ties -= tie ? 1 : 0;
    f(at, tie || coarse.score[at] > allotment.threshold[query]);
  }
}

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

ClusterIndex::ClusterIndex(QueryBasis basis, std::vector<uint32_t> order, KeyCodes codes,
                           ValueCodes values, NodeLevel leaves, NodeLevel supers)
    : basis_(std::move(basis)),
      order_(std::move(order)),
      codes_(std::move(codes)),
      values_(std::move(values)),
      leaves_(std::move(leaves)),
      supers_(std::move(supers)) {}

void ClusterIndex::SetScales(std::vector<uint16_t> scale) {
  scale_ = std::move(scale);
  most_scale_.assign(leaves_.nodes(), 0.0f);
  for (uint32_t t = 0; t < scale_.size(); ++t) {
    most_scale_[t / kLeafRows] = std::max(most_scale_[t / kLeafRows], Bf16ToFloat(scale_[t]));
  }
  scale_.resize(codes_.keys_padded());
}

void ClusterIndex::AttendAll(const KvView& run, const QueryBlock& queries,
                             std::span<Partial> acc) const {
  ExactScan().AttendAll(run, queries, acc);
}

uint64_t ClusterIndex::memory_bytes() const {
  return 2 * scale_.size() +
         4 * (order_.size() + most_scale_.size() + token_slope_.size() + inside_leaf_.slope.size() +
              inside_super_.slope.size() + inside_leaf_.covariance.size() +
              inside_super_.covariance.size()) +
         codes_.memory_bytes() + values_.memory_bytes() + leaves_.memory_bytes() +
         supers_.memory_bytes();
}

// The places in the order that a node holds.
TokenRange ClusterIndex::Places(uint32_t node) const {
  if (node < first_leaf()) return {node, node + 1};
  if (node < first_super()) {
    const uint32_t lo = (node - first_leaf()) * kLeafRows;
    return {lo, std::min(tokens(), lo + kLeafRows)};
  }
  const uint32_t lo = (node - first_super()) * kSuperRows;
  return {lo, std::min(tokens(), lo + kSuperRows)};
}

void ClusterIndex::Selected(const CoarseScores& coarse, const RunAllotment& allotment,
                            uint32_t query, std::vector<uint32_t>* out) const {
  ForEntries(coarse, allotment, query, [&](size_t at, bool taken) {
    if (!taken) return;
    const TokenRange places = Places(coarse.node[at]);
    for (uint32_t p = places.lo; p < places.hi; ++p) out->push_back(order_[p]);
  });
}

void ClusterIndex::Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
                          const RunAllotment& allotment, std::span<Partial> acc) const {
  std::vector<std::vector<Candidate>> found(queries.queries);
  std::vector<uint32_t> selected;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    selected.clear();
    Selected(coarse, allotment, i, &selected);
    for (uint32_t token : selected) found[i].push_back({run.tokens().lo + token, 0.0f});
  }
  CoarseScores rows;
  ListCandidates(run.tokens(), queries.ranges, found, &rows);
  RescoreCandidates(run, queries, &rows);
  rows.bytes += coarse.bytes;
  const RunAllotment all{std::vector<float>(queries.queries, kNone),
                         std::vector<uint32_t>(queries.queries, 0)};
  AttendCandidates(run, queries, rows, all, acc);
  Estimate(queries, coarse, allotment, acc);
}

void ClusterIndex::Estimate(const QueryBlock& queries, const CoarseScores& coarse,
                            const RunAllotment& allotment, std::span<Partial> acc) const {
  std::vector<float> q(queries.q, queries.q + size_t{queries.queries} * queries.head_dim);
  for (float& x : q) x *= queries.scale;
  const auto query = [&](uint32_t i) {
    return std::span<const float>(q).subspan(size_t{i} * queries.head_dim, queries.head_dim);
  };
  // Leaves of which some query has tokens, and where they stand among these.
  std::vector<uint32_t> opened, place(leaves_.nodes(), ~0u);
  for (size_t e = 0; e < coarse.node.size(); ++e) {
    if (coarse.node[e] < first_leaf()) place[coarse.node[e] / kLeafRows] = 0;
  }
  for (uint32_t leaf = 0; leaf < place.size(); ++leaf) {
    if (place[leaf] == ~0u) continue;
    place[leaf] = static_cast<uint32_t>(opened.size());
    opened.push_back(leaf);
  }
  std::vector<float> token(queries.queries * opened.size() * kLeafRows);
  std::vector<float> o(size_t{queries.queries} * queries.head_dim);
  std::vector<Partial> parts(queries.queries);
  std::vector<float> weight, leaf(leaves_.nodes()), super(supers_.nodes());
  for (uint32_t i = 0; i < queries.queries; ++i) {
    parts[i].acc = std::span(o).subspan(size_t{i} * queries.head_dim, queries.head_dim);
    const std::span<const float> scores = coarse.Row(i);
    weight.assign(scores.begin(), scores.end());
    ForEntries(coarse, allotment, i, [&](size_t at, bool taken) {
      if (taken) weight[at - coarse.first[i]] = kNone;
    });
    const float largest = Kernels().max(weight.data(), weight.size());
    if (largest == kNone) continue;
    parts[i].max = largest;
    Kernels().exp_sum(weight.data(), weight.size(), largest);
    std::fill(leaf.begin(), leaf.end(), 0.0f);
    std::fill(super.begin(), super.end(), 0.0f);
    float* const row = token.data() + i * opened.size() * kLeafRows;
    for (size_t e = 0; e < weight.size(); ++e) {
      const uint32_t node = coarse.node[coarse.first[i] + e];
      const float w = weight[e] * static_cast<float>(coarse.weight[coarse.first[i] + e]);
      if (node >= first_super()) {
        super[node - first_super()] = w;
      } else if (node >= first_leaf()) {
        leaf[node - first_leaf()] = w;
      } else {
        row[place[node / kLeafRows] * kLeafRows + node % kLeafRows] = w;
      }
    }
    AddMeans(leaves_, leaf, inside_leaf_.slope, query(i), &parts[i]);
    AddMeans(supers_, super, inside_super_.slope, query(i), &parts[i]);
  }
  AddTokens(queries, q.data(), opened, token, parts);
  for (uint32_t i = 0; i < queries.queries; ++i) acc[i].Merge(parts[i]);
}

// Tokens of opened leaves: their leaf's mean and their own codes.
void ClusterIndex::AddTokens(const QueryBlock& queries, const float* q,
                             std::span<const uint32_t> leaves, std::span<const float> weight,
                             std::span<Partial> parts) const {
  if (leaves.empty()) return;
  const size_t row = leaves.size() * kLeafRows;
  std::vector<float> of_leaf(leaves.size()), sums(size_t{queries.queries} * queries.head_dim);
  values_.AddWeighted(leaves, weight, queries.queries, sums);
  parts[0].bytes += leaves.size() * (values_.block_bytes() + queries.head_dim * 2);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    float total = 0;
    for (size_t l = 0; l < leaves.size(); ++l) {
      of_leaf[l] = 0;
      for (uint32_t t = 0; t < kLeafRows; ++t) of_leaf[l] += weight[i * row + l * kLeafRows + t];
      total += of_leaf[l];
    }
    parts[i].sum += total;
    kernels::AccumulateTile tile{};
    tile.p = of_leaf.data();
    tile.ld_p = of_leaf.size();
    tile.queries = 1;
    tile.head_dim = queries.head_dim;
    tile.v = leaves_.values().data();
    tile.rows = leaves.data();
    tile.tokens = static_cast<uint32_t>(leaves.size());
    tile.dtype = kernels::kBf16;
    tile.acc = parts[i].acc.data();
    Kernels().accumulate(tile);
    for (uint32_t d = 0; d < queries.head_dim; ++d) {
      parts[i].acc[d] += sums[size_t{i} * queries.head_dim + d];
    }
    AddSlope(token_slope_, {q + size_t{i} * queries.head_dim, queries.head_dim}, total,
             parts[i].acc);
  }
}

void ClusterIndex::AddMeans(const NodeLevel& level, std::span<const float> weight,
                            std::span<const float> slope, std::span<const float> query,
                            Partial* part) {
  float sum = 0;
  for (float w : weight) sum += w;
  if (sum == 0) return;
  part->sum += sum;
  // What is too light to matter is not read, but counts.
  const float least = 1e-4f * sum / static_cast<float>(weight.size());
  const auto head_dim = static_cast<uint32_t>(part->acc.size());
  std::vector<uint32_t> rows;
  std::vector<float> p;
  for (uint32_t n = 0; n < weight.size(); ++n) {
    if (weight[n] <= least) continue;
    rows.push_back(n);
    p.push_back(weight[n]);
  }
  kernels::AccumulateTile tile{};
  tile.p = p.data();
  tile.ld_p = p.size();
  tile.queries = 1;
  tile.head_dim = head_dim;
  tile.v = level.values().data();
  tile.rows = rows.data();
  tile.tokens = static_cast<uint32_t>(rows.size());
  tile.dtype = kernels::kBf16;
  tile.acc = part->acc.data();
  Kernels().accumulate(tile);
  part->bytes += rows.size() * head_dim * 2;
  AddSlope(slope, query, sum, part->acc);
}

}  // namespace quarry
